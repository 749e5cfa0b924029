"""What the scripts print as milliseconds and rates, by a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch

from tests.bench.clock import MEASURED, MEDIANS, WARM_UP, Clock, Ticking


@pytest.fixture
def clock():
    return Clock()


def test_a_call_is_the_median_of_rows_behind_the_warm_up(script, clock, monkeypatch):
    shared = script("shared")
    monkeypatch.setattr(shared, "time", clock)
    rows = iter([900.0] * 2 + [800.0] * 2 + [1.0, 2.0] + [30.0, 40.0] + [5.0, 7.0])  # two calls a row
    both = shared.medians_ms(lambda: clock.takes(next(rows)), repeats=3, warmup=2, queued=2)
    assert both == pytest.approx((6.0, 6.0)) and next(rows, None) is None


def test_forward_and_backward_are_timed_apart(script, clock, monkeypatch):
    shared = script("shared")
    monkeypatch.setattr(shared, "time", clock)

    def fn(x):
        clock.takes(3.0)
        y = x * 1
        y.register_hook(lambda _: clock.takes(5.0))
        return y

    times = shared.forward_backward(fn, [torch.ones(2, requires_grad=True)], repeats=3)
    assert {name: ms for name, (ms, _) in times.items()} == pytest.approx({"forward": 3, "backward": 5, "both": 8})
    assert list(shared.forward_backward(fn=lambda x: x + 1, inputs=[torch.ones(2)], repeats=1)) == ["forward"]


def test_an_error_is_a_row_but_not_of_ours(script):
    attempt = script("shared").attempt

    def refuse():
        raise ValueError("no such tile\nand more about it")

    assert attempt(refuse, ours=False) == {"failed": "ValueError: no such tile"}
    with pytest.raises(ValueError, match="no such tile"):
        attempt(refuse, ours=True)


@pytest.mark.parametrize("updates", [True, False])
def test_a_step_on_several_gpus(script, clock, monkeypatch, updates):
    """Clipping and the optimizer are in the step and its tokens/s, and not in the FLOPs of forward and backward."""
    gpus = script("gpus")
    monkeypatch.setattr(gpus, "time", clock)
    monkeypatch.setattr(gpus, "tokens", lambda *_: torch.ones(1, 4))
    monkeypatch.setattr(gpus, "step_flops", lambda config, batch, seq: 1e9 * batch * seq)
    optimizer = SimpleNamespace(step=lambda: clock.takes(25.0)) if updates else None
    model, device = Ticking(clock, [*WARM_UP, *MEASURED]), torch.device("cpu")
    clip = lambda parameters, norm: clock.takes(5.0 * norm)  # noqa: E731
    row = gpus.measure(model, None, optimizer, clip, model.config, 2, 50, device)
    forward, backward, whole = MEDIANS
    assert (row["forward_ms"], row["backward_ms"]) == (forward, backward)
    assert (row.get("clip_ms"), row.get("optimizer_ms")) == ((5.0, 25.0) if updates else (None, None))
    assert row["step_ms"] == whole + 30.0 * updates
    assert row["tokens_per_second_per_gpu"] == round(2 * 50 / row["step_ms"] * 1e3)
    assert row["tflops_per_gpu"] == round(1e9 * 2 * 50 / whole / 1e9, 1)


def test_time_that_something_ran(script):
    """Overlapping spans count once."""
    assert script("gpus").covered([(0, 4, False), (2, 6, True), (10, 11, False)]) == 7
