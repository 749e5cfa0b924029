"""The arithmetic behind published figures, by a clock that the test moves and with numbers made up for it."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from expertmesh.bench import loops, steps
from expertmesh.bench import run as bench
from expertmesh.bench.arms import ARMS
from expertmesh.bench.loops import LOOPS
from expertmesh.bench.run import BenchOptions, run
from tests.bench.clock import MEASURED, MEDIANS, WARM_UP, Clock, Ticking


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(steps, "time", made)
    monkeypatch.setattr(loops, "time", made)
    return made


def test_a_step_is_the_median_of_those_behind_the_warm_up(clock):
    step = steps.Step(Ticking(clock, [*WARM_UP, *MEASURED, (5.0, 5.0)]), batch=1, seq=4, full=False)
    found = steps.measure(step, warmup=2, repeats=5)
    assert (found["forward_ms"], found["backward_ms"], found["step_ms"]) == MEDIANS
    assert found["clip_ms"] is found["optimizer_ms"] is found["peak_gib"] is None
    assert found["first_step_s"] == 1.7 and found["loss"] == 1.0


def test_clipping_and_the_optimizer_are_phases_of_a_step(clock, monkeypatch):
    monkeypatch.setattr(steps, "clip_grad_norm", lambda parameters, norm: clock.takes(7.0 * norm))
    step = steps.Step(Ticking(clock, itertools.repeat((1.0, 2.0))), batch=1, seq=4, full=True, ours=True)
    step.optimizer.step = lambda: clock.takes(11.0)
    found = steps.measure(step, warmup=1, repeats=1)
    assert [found[f"{phase}_ms"] for phase in steps.PHASES] == [1.0, 2.0, 7.0, 11.0] and found["step_ms"] == 21.0


def test_the_ceilings_are_medians_of_calls_behind_a_warm_up(clock, monkeypatch):
    times = itertools.chain([900.0, 800.0, 700.0], [2.0] * 8 + [4.0] * 3 + [50.0] * 9)
    assert steps._median_ms(lambda: clock.takes(next(times)), "cpu") == pytest.approx(4.0)
    assert next(times, None) is None, "23 calls"
    monkeypatch.setattr(steps, "_median_ms", lambda run, device: run() is None or 2.0)
    assert steps.gemm_tflops("cpu") == pytest.approx(512**3 * 2 / 2e-3 / 1e12)
    assert steps.copy_tb_per_second("cpu") == pytest.approx(2 * 2**26 / 2e-3 / 1e12)


@pytest.mark.parametrize("packed", [False, True])
def test_rates_of_a_row_follow_from_its_times(monkeypatch, packed):
    """3 GFLOPs a token in a row of one document; of several, each costs so many as it has tokens, and one more."""
    times = {"forward_ms": 30.0, "backward_ms": 50.0, "clip_ms": 5.0, "optimizer_ms": 15.0, "step_ms": 100.0}
    monkeypatch.setattr(steps, "measure", lambda step, warmup, repeats: times | {"peak_gib": None})
    monkeypatch.setattr(steps, "gemm_tflops", lambda device: 40.0)
    monkeypatch.setattr(bench, "step_flops", lambda config, batch, seq: 3e9 * batch * (seq + 1))
    options = BenchOptions(
        arms=("expertmesh",), batches=(2,), seq=64, layers=1, tiny=True, device="cpu", proof=False, packed=packed
    )
    (row,) = run(options, say=lambda line: None)["rows"]
    tflops = 3e9 * 2 * (64 + row["documents"]) / 80e-3 / 1e12
    assert row["documents"] == (14 if packed else 1)
    assert row["tokens_per_second_per_gpu"] == 2 * 64 * 10
    assert row["tflops_per_gpu"] == pytest.approx(tflops, abs=1e-4)
    assert row["percent_of_gemm"] == pytest.approx(100 * tflops / 40, abs=0.051)


@pytest.mark.parametrize(("options", "loop", "expected"), [((None, None), (), (3, 7)), ((5, 4), (), (5, 4)),
                                                           ((None, None), ("sft",), (6, 24))])  # fmt: skip
def test_how_much_is_warmed_up_and_measured(options, loop, expected):
    warmup, repeats = options
    asked = BenchOptions(warmup=warmup, repeats=repeats, loops=loop)
    made = bench._Bench(asked, "cpu", "qwen3-30b-a3b", {}, lambda line: None)
    assert (made.warmup, made.repeats) == expected


class FakeTrainer:
    """Calls a watch as transformers' does. `steps`: (milliseconds before the step, of it, real tokens, loss)."""

    def __init__(self, clock, steps):
        self.clock, self.steps, self.args = clock, steps, SimpleNamespace(device=torch.device("cpu"))

    def add_callback(self, watch):
        self.watch = watch

    def remove_callback(self, callback):
        pass

    def training_step(self, model, inputs, num_items):
        assert num_items == 7
        self.clock.takes(self.took)
        return self.loss

    def train(self):
        state = SimpleNamespace(global_step=0, max_steps=len(self.steps))
        self.watch.on_train_begin(self.args, state, None)
        for loading, took, tokens, loss in self.steps:
            self.clock.takes(loading)
            self.took, self.loss = took, torch.tensor(loss)
            inputs = {"input_ids": torch.ones(2, 8)}
            if tokens is not None:
                inputs["attention_mask"] = (torch.arange(16) < tokens).view(2, 8)
            self.training_step(None, inputs, 7)
            self.loss.fill_(0)  # as a recorded step does, which always writes to the same place
            state.global_step += 1
            self.watch.on_step_end(self.args, state, None)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_counts_whole_steps_behind_the_warm_up_and_no_padding(clock, monkeypatch, ranks):
    warm_up = [(500.0, 2500.0, 9, 8.0), (400.0, 600.0, 8, 7.0)]
    measured = [(10.0, 20.0, 5, 6.0), (5.0, 35.0, 16, 5.0), (20.0, 80.0, None, 4.0), (1.0, 29.0, 3, 3.0)]
    asked = []
    monkeypatch.setattr(loops, "current_world_size", lambda: ranks)
    monkeypatch.setattr(loops, "_trainer", lambda *_: FakeTrainer(clock, [*warm_up, *measured]))
    loop = loops.Loop("Trainer", lambda *sizes: asked.append(sizes))
    row = loops.measure(loop, ARMS["stock"], Ticking(clock, ()), batch=2, seq=8, warmup=2, repeats=4)
    assert asked == [((6 + 1) * 2 * ranks, 8, 9)], "a row for every step, and some to spare"
    assert row["steps_ms"] == [30.0, 40.0, 100.0, 30.0] and row["step_ms"] == 35.0
    assert row["tokens"] == [5, 16, 16, 3] and row["first_step_s"] == 3.0
    assert row["tokens_per_second_per_gpu"] == 200 and row["tokens_per_second"] == 200 * ranks
    assert row["ranks"] == ranks and row["losses"] == [8.0, 7.0, 6.0, 3.0]


def test_a_loop_that_ends_early_is_no_result(clock, monkeypatch):
    monkeypatch.setattr(loops, "_trainer", lambda *_: FakeTrainer(clock, [(1.0, 1.0, 4, 1.0)] * 2))
    loop = loops.Loop("Trainer", lambda *_: None)
    with pytest.raises(AssertionError, match="2 steps ran, not 3"):
        loops.measure(loop, ARMS["stock"], Ticking(clock, ()), batch=1, seq=8, warmup=1, repeats=2)


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_is_trained_by_what_it_is_named_after(name, tmp_path, monkeypatch):
    """The settings that make a loop what the tables say it is."""
    made = []
    monkeypatch.setattr(loops, "import_module", lambda source: SimpleNamespace(
        **{kind: lambda model, **options: made.append(options) for kind in ("Trainer", "SFTTrainer", "DPOTrainer")},
        **{kind: lambda **settings: settings for kind in ("TrainingArguments", "SFTConfig", "DPOConfig")},
    ))  # fmt: skip
    loop, model = LOOPS[name], Ticking(Clock(), ())
    monkeypatch.setattr("peft.get_peft_model", lambda model, adapters: made.append({"peft_config": adapters}))
    loops._trainer(loop, ARMS["stock"], model, None, batch=3, seq=48, steps=5, folder=str(tmp_path))
    settings = made[-1]["args"]
    assert settings.items() >= {"max_steps": 5, "per_device_train_batch_size": 3, "max_grad_norm": 1.0}.items()
    assert settings["optim"] == "adamw_torch_fused" and settings.get("max_length", 48) == 48
    assert settings.get("packing", False) == (name == "sft-packed")
    assert ("data_collator" in made[-1]) == (name == "trainer-padded")
    adapters = [options["peft_config"] for options in made if "peft_config" in options]
    assert [found.r for found in adapters] == ([16] if name in ("lora", "lora-experts", "dpo") else [])
    assert [bool(found.target_parameters) for found in adapters] == [name == "lora-experts"] * len(adapters)
