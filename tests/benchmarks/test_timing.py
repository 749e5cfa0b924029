"""What the scripts print as milliseconds and rates, by a clock that the test moves."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.bench.clock import MEASURED, MEDIANS, WARM_UP, Clock, Ticking

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


def test_a_call_is_the_median_of_rows_behind_the_warm_up(script, clock, monkeypatch):
    timing = script("timing")
    monkeypatch.setattr(timing, "time", clock)
    rows = iter([900.0] * 2 + [800.0] * 2 + [1.0, 2.0] + [30.0, 40.0] + [5.0, 7.0])  # two calls a row
    both = timing.medians_ms(lambda: clock.takes(next(rows)), repeats=3, warmup=2, queued=2)
    assert both == pytest.approx((6.0, 6.0)) and next(rows, None) is None


def test_a_step_of_the_cpu_script(script, clock, monkeypatch):
    cpu = script("cpu")
    monkeypatch.setattr(cpu, "time", clock)
    models = {arm: Ticking(clock, [*WARM_UP, *MEASURED]) for arm in ("stock", "expertmesh")}
    found = cpu.measure(models, torch.ones(1, 4), rounds=5)
    row = cpu.row("stock", found["stock"], {"num_hidden_layers": 1}, batch=2, seq=50)
    assert (row["forward_ms"], row["backward_ms"], row["both_ms"]) == MEDIANS
    assert row["both_shortest_ms"] == 6.0 and row["tokens_per_second"] == 2 * 50 * 100


@pytest.mark.parametrize("updates", [True, False])
def test_a_step_of_the_script_for_eight_gpus(script, clock, monkeypatch, updates):
    """Clipping and the optimizer are in the step and its tokens/s, and not in the FLOPs of forward and backward."""
    eight = script("eight_gpus")
    monkeypatch.setattr(eight, "time", clock)
    monkeypatch.setattr(eight, "tokens", lambda *_: torch.ones(1, 4))
    monkeypatch.setattr(eight, "step_flops", lambda config, batch, seq: 1e9 * batch * seq)
    optimizer = SimpleNamespace(step=lambda: clock.takes(25.0)) if updates else None
    model, device = Ticking(clock, [*WARM_UP, *MEASURED]), torch.device("cpu")
    clip = lambda parameters, norm: clock.takes(5.0 * norm)  # noqa: E731
    row = eight.measure(model, None, optimizer, clip, model.config, 2, 50, device)
    forward, backward, whole = MEDIANS
    assert (row["forward_ms"], row["backward_ms"]) == (forward, backward)
    assert (row.get("clip_ms"), row.get("optimizer_ms")) == ((5.0, 25.0) if updates else (None, None))
    assert row["step_ms"] == whole + 30.0 * updates
    assert row["tokens_per_second_per_gpu"] == round(2 * 50 / row["step_ms"] * 1e3)
    assert row["tflops_per_gpu"] == round(1e9 * 2 * 50 / whole / 1e9, 1)


def test_a_step_of_the_script_for_two_gpus(script, clock, monkeypatch):
    two = script("two_gpus")
    fake = SimpleNamespace(Event=clock.event, synchronize=lambda: None, reset_peak_memory_stats=lambda: None)
    monkeypatch.setattr(two.torch, "cuda", SimpleNamespace(**vars(fake), max_memory_allocated=lambda: 3 * 2**29))
    monkeypatch.setattr(two, "tokens", lambda *_: torch.ones(1, 4))
    model = Ticking(clock, [*WARM_UP, *MEASURED])
    row = two.time_arm(model, model.config, 2, 50, torch.device("cpu"))
    assert (row["forward_ms"], row["backward_ms"], row["step_ms"]) == MEDIANS
    assert row["tokens_per_second_per_gpu"] == 2 * 50 * 100 and row["peak_gib"] == 1.5
