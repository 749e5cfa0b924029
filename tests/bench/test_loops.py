"""People's loops at tiny size: each runs on the CPU, arms train the same, and tokens and times are counted right."""

import statistics

import pytest
import torch

from expertmesh.bench import loop_rows, loops
from expertmesh.bench import run as bench
from expertmesh.bench.loops import LOOPS
from expertmesh.bench.run import BenchOptions, run
from expertmesh.bench.works import WORKS
from expertmesh.train.errors import ConfigError
from tests.distributed.ranks import on_ranks

KEYS = """
work loop arm layers batch seq routing ranks transformers trl step_ms steps_ms tokens tokens_per_second
tokens_per_second_per_gpu peak_gib reserved_gib first_step_s losses
""".split()


def tiny(**changes):
    """A short run; returns (result, lines said)."""
    said = []
    options = {"arms": ("stock", "expertmesh"), "batches": (2,), "seq": 32, "warmup": 1, "repeats": 3} | changes
    return run(BenchOptions(tiny=True, device="cpu", **options), say=said.append), said


@pytest.fixture
def learning(monkeypatch):
    """A rate at which a few steps change the loss."""
    monkeypatch.setitem(loops.SETTINGS, "learning_rate", 1e-2)


@pytest.mark.parametrize("name", LOOPS)
def test_stock_and_ours_train_the_same(name, learning):
    result, _ = tiny(loops=(name,))
    assert not result["failed"] and len(result["rows"]) == 2
    for row in result["rows"]:
        assert list(row) == KEYS and row["loop"] == name and row["ranks"] == 1
        assert row["peak_gib"] is None and (row["trl"] is None) == (LOOPS[name].trainer == "Trainer")
        assert len(row["steps_ms"]) == len(row["tokens"]) == 3 and min(row["steps_ms"]) > 0
        assert row["step_ms"] == pytest.approx(statistics.median(row["steps_ms"]), abs=0.01)
        rate = sum(row["tokens"]) / sum(row["steps_ms"]) * 1e3
        assert row["tokens_per_second"] == row["tokens_per_second_per_gpu"] == pytest.approx(rate, rel=0.01)
    stock, ours = result["rows"]
    assert stock["tokens"] == ours["tokens"] and len(stock["losses"]) == 4
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-3)
    assert abs(stock["losses"][-1] - stock["losses"][0]) > 1e-3, "nothing was learnt"
    if LOOPS[name].rows is loop_rows.whole or name == "sft":
        assert stock["tokens"] == [64] * 3
    else:
        assert len(set(stock["tokens"])) > 1 and max(stock["tokens"]) <= (128 if name == "dpo" else 64)


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_our_trainers_train_the_same(name, learning):
    result, _ = tiny(loops=(name,), arms=("stock", "expertmesh-trainer"))
    stock, ours = result["rows"]
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-3)


@pytest.mark.parametrize("work", sorted(WORKS.keys() - {"qwen3-30b-a3b"}))
def test_every_work_trains(work):
    result, _ = tiny(works=(work,), loops=("trainer", "lora", "lora-experts"), repeats=1)
    assert not result["failed"]
    for stock, ours in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-3)


def test_the_arms_get_the_trainers_and_the_arguments_they_stand_for(monkeypatch):
    made, compiled = [], []

    def noting(*arguments):
        made.append(own(*arguments))
        return made[-1]

    def compiling(model, **options):
        compiled.append(len(made))
        return model

    own = loops._trainer
    monkeypatch.setattr(loops, "_trainer", noting)
    monkeypatch.setattr(torch, "compile", compiling)
    result, said = tiny(loops=("sft", "dpo"), arms=("stock-compiled", "stock", "expertmesh-trainer"), repeats=1)
    assert not result["failed"]
    kinds = [f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}" for trainer in made]
    assert kinds == ["trl.SFTTrainer"] * 2 + ["expertmesh.SFTTrainer"] + ["trl.DPOTrainer"] * 2
    assert [trainer.args.torch_compile for trainer in made] == [True, False, False, True, False]
    assert set(compiled) == {1, 4}, "the arm after a compiled one is not"
    for trainer in made:
        assert trainer.args.max_grad_norm == 1.0 and trainer.args.optim.value == "adamw_torch_fused"
        assert not trainer.args.gradient_checkpointing and not trainer.args.bf16
        assert not trainer.model.config.use_cache, "the trainer switches the cache off, as for everybody"
    assert sum("expertmesh has no DPOTrainer" in line for line in said) == 1


def test_experts_in_4_bits_are_an_arm_of_loops_with_adapters(monkeypatch):
    own = loops.loop_config

    def whole_blocks(*arguments):
        config = own(*arguments)
        config.hidden_size = config.moe_intermediate_size = 64
        return config

    monkeypatch.setattr(loops, "loop_config", whole_blocks)
    arms = ("expertmesh", "expertmesh-4bit")
    result, said = tiny(loops=("trainer", "lora-experts"), arms=arms, repeats=1)
    assert not result["failed"]
    assert [(row["loop"], row["arm"]) for row in result["rows"]] == [
        ("trainer", "expertmesh"),
        *(("lora-experts", arm) for arm in arms),
    ]
    assert all(loss == pytest.approx(8, rel=0.2) for row in result["rows"] for loss in row["losses"])
    assert any("experts in 4 bits are frozen" in line for line in said)
    with pytest.raises(ConfigError, match="expertmesh-4bit is an arm of people's loops: add --loop"):
        tiny(arms=arms)


def test_an_arm_that_fails_is_noted_and_the_others_run(monkeypatch):
    def broken(loop, arm, *arguments):
        if arm.name == "stock":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(loop, arm, *arguments)

    own = loops.measure
    monkeypatch.setattr(bench.loops, "measure", broken)
    result, said = tiny(loops=("trainer",), repeats=1)
    assert [row["arm"] for row in result["rows"]] == ["expertmesh"]
    assert [(failure["arm"], failure["what"]) for failure in result["failed"]] == [("stock", "trainer, 2 x 32")]
    assert any("FAILED: OutOfMemoryError" in line for line in said)


def test_one_process_with_several_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=0"):
        loops.refuse(("trainer",), (), 32, "cuda")
    loops.refuse(("trainer",), (), 32, "cpu")


def test_rows_have_the_lengths_they_should():
    assert [len(row["input_ids"]) for row in loop_rows.ragged(50, 64, 4096)] != [64] * 50
    assert all(16 <= len(row["input_ids"]) <= 64 for row in loop_rows.ragged(50, 64, 4096))
    lengths = [len(ids) for ids in loop_rows.documents(20, 256, 4096)["input_ids"]]
    assert sum(lengths) >= 20 * 256 and min(lengths) == 8 and 128 < max(lengths) < 256
    assert statistics.median(lengths) < 64, "most are short"
    pairs = loop_rows.pairs(3, 64, 4096)
    assert all(row["chosen"] != row["rejected"] for row in pairs) and len(set(pairs["prompt"])) == 3


def two_ranks(rank, folder):
    result, said = tiny(
        loops=("trainer",), arms=None, repeats=2, out=str(folder / "out.json"), batches=(1,), commit="c" * 40
    )
    return result, said


def test_two_ranks_train_the_same(tmp_path):
    (first, said), (second, silent) = on_ranks(2, two_ranks, tmp_path)
    assert not first["failed"] and [row["arm"] for row in first["rows"]] == list(loops.ON_RANKS)
    assert said and not silent and (tmp_path / "out.json").exists()
    for result in (first, second):
        for row in result["rows"]:
            assert row["ranks"] == 2 and row["tokens"] == [32, 32]
            assert row["tokens_per_second"] == pytest.approx(2 * row["tokens_per_second_per_gpu"], abs=1)
            assert row["losses"] == pytest.approx(result["rows"][0]["losses"], rel=1e-3)
    assert first["rows"][0]["losses"] != second["rows"][0]["losses"], "every rank has rows of its own"
