"""Every script of benchmarks/ runs, here with small sizes on a CPU, and writes its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expertmesh import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows(script, tmp_path, monkeypatch):
    """The rows that a script writes, by its name and options."""

    def run(name: str, *options: str) -> list[dict]:
        out = tmp_path / "out.json"
        small = ["--tiny", "--repeats", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *small, *options])
        script(name).main()
        return json.loads(out.read_text())["rows"]

    return run


def test_causal_attention(rows):
    found = rows("attention", "--work", "causal")
    works = ("qwen3-30b-a3b", "nemotron-3-nano", "deepseek-v3")
    assert [(row["work"], row["batch"]) for row in found] == [(work, batch) for work in works for batch in (1, 2, 4)]
    assert all(row["both_ms"] > 0 and row["error"] == [0, 0] for row in found)


def test_attention_over_packed_documents(rows):
    found = rows("attention", "--work", "packed")
    assert [row["arm"] for row in found] == ["transformers", "expertmesh", "unpacked"] * 2
    assert all(row["tokens_per_second"] > 0 and row["mask_ms"] >= 0 and max(row["error"]) < 0.02 for row in found)


def test_attention_with_sinks(rows):
    found = rows("attention", "--work", "sinks")
    arms = [(row["work"], row["arm"]) for row in found]
    assert arms == [(work, "expertmesh") for work in ("full", "window", "packed", "eager")] + [("eager", "eager")]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 and max(row["error"]) < 0.02 for row in found)


def test_pairs_that_see_each_other(script):
    """Half of a square, the sum over documents, a band below a window."""
    seen = script("attention").seen
    assert seen([10]) == 50 and seen([6, 4]) == 26 and seen([10], window=2) == 18 and seen([10], window=10) == 50


def test_simulated_ranks(rows):
    found = rows("simulate")
    assert [row["ranks"] for row in found] == [8] * 3
    assert all(row["sent_gb"] and row["step_s"][0] <= row["step_s"][1] for row in found)


def test_adapters_on_experts(rows):
    found = rows("adapters")
    assert [row["arm"] for row in found] == ["expertmesh", "expertmesh-triton", "native", "whole"] * 2
    assert all(row["both_ms"] > 0 for row in found)


def test_experts(rows, tmp_path):
    found = rows("experts")
    assert [row["arm"] for row in found] == ["stock", "expertmesh", "expertmesh-triton"] * 4
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in found)
    kernels = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert list(kernels) == ["up_act", "down", "down_dact", "up_dgrad", "up_wgrad", "down_wgrad"]


def test_small_kernels(rows):
    found = rows("small_kernels")
    passes = {(row["kernel"], row["pass"]) for row in found if row["implementation"] == "expertmesh"}
    assert {row["implementation"] for row in found} == {"expertmesh", "torch"}
    assert {("rope", "backward"), ("combine", "forward"), ("clip and adamw", "forward")} <= passes
    assert {what for kernel, what in passes if kernel.startswith("linear")} == {"both"}
    assert not any("failed" in row for row in found)
    assert {row["kernel"] for row in rows("small_kernels", "--only", "swiglu,relu2")} == {"swiglu", "relu2"}


def test_mamba(script):
    """Without a GPU the script needs Triton's interpreter, so here the references stand for the kernels."""
    mamba = script("mamba")
    sizes = mamba.Sizes(1, 24, 2, 8, 1, 8)
    leaves, times = mamba.inputs(sizes), mamba.floors(sizes)
    for name, (_, reference) in mamba.functions(sizes, None).items():
        found = mamba.forward_backward(reference, leaves[name], 1)
        assert found["forward"][0] > 0 and found["backward"][0] > 0 and times[name][1] > times[name][0] > 0


def test_cpu(rows):
    found = rows("cpu", "--threads", str(torch.get_num_threads()))
    assert [row["arm"] for row in found] == ["stock-eager", "stock", "expertmesh"]
    assert all(row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) for row in found)


@pytest.mark.slow
def test_expertmesh_is_not_slower_than_stock_on_a_cpu(script):
    """Shortest of alternating steps, because other work may share the cores."""
    cpu = script("cpu")
    models = cpu.build(cpu.CONFIG)
    ids = torch.randint(0, cpu.CONFIG["vocab_size"], (8, 256))
    steps = cpu.measure(models, ids, rounds=7)
    shortest = {arm: min(forward + backward for forward, backward, _ in steps[arm]) for arm in models}
    assert shortest["expertmesh"] < min(shortest["stock"], shortest["stock-eager"]), shortest


def test_first_step_runs_a_process_for_each_cache(rows, script, monkeypatch):
    first_step, caches = script("first_step"), []

    def in_this_process(command, env, **_):
        caches.append([env[name] for name in first_step.CACHES])
        assert command[:3] == [sys.executable, "-m", "expertmesh"]
        return SimpleNamespace(returncode=cli.run(command[3:]))

    monkeypatch.setattr(first_step, "subprocess", SimpleNamespace(run=in_this_process))
    found = rows("first_step", "--works", "gpt-oss-20b")
    assert [(row["work"], row["cache"]) for row in found] == [("gpt-oss-20b", "empty"), ("gpt-oss-20b", "warm")]
    assert all(row["first_step_s"] >= 0 for row in found)
    assert caches[0] == caches[1] and len({*caches[0]}) == 3, "the second finds what the first has compiled"


def test_gradient_release(rows):
    found = rows("gradient_release", "--batch", "1", "--layers", "2", "--recompute", "experts=1")
    assert [row["arm"] for row in found] == ["ordinary", "running", "exact"]
    assert all(row["step_ms"] > 0 and row["tokens_per_second"] > 0 for row in found)


def test_a_whole_model_on_one_gpu_needs_no_weights_and_no_network(rows, tmp_path):
    """The keys of examples/one-gpu-full.yaml, on a tiny model and files that every machine has."""
    keys = [
        "data.max_length=32",
        "train.per_device_train_batch_size=8",
        "train.max_steps=6",
        "train.learning_rate=0.01",
    ]
    (row,) = rows("train_run", "--folder", str(tmp_path), "--keys", *keys)
    assert (row["loop"], row["arm"], row["batch"], row["seq"]) == ("train", "running", 8, 32) and row["step_ms"] > 0
    assert len(row["losses"]) == 6 and row["losses"][-1] < row["losses"][0]
    assert not list((tmp_path / "model").glob("*.safetensors")) and not (tmp_path / "run" / "final").exists()


def on_two_ranks(script: str, out: Path, *options: str) -> dict:
    """The result that two processes write."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*launcher, str(ROOT / "benchmarks" / script), *options, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=200,
    )
    result = json.loads(out.read_text())
    assert result["gpus"] == 0 and result["command"].startswith("torchrun --nproc-per-node 2 ")
    return result


SMALL = "--batches", "1", "--seq", "16"


def test_whole_steps_on_several_gpus(tmp_path):
    arms = ["stock-ep", "expertmesh-ep-experts", "expertmesh-ep-8bit-released"]
    options = ["--routings", "balanced", "--arms", *arms]
    rows = on_two_ranks("gpus.py", tmp_path / "result.json", *options, *SMALL)["rows"]
    assert [row["arm"] for row in rows] == arms
    for row in rows:
        both = row["forward_backward_ms"] if "released" in row["arm"] else row["forward_ms"] + row["backward_ms"]
        phases = both + row["clip_ms"] + row["optimizer_ms"]
        assert 0 < phases <= 1.5 * row["step_ms"] and row["tokens_per_second_per_gpu"] > 0


@pytest.mark.slow
def test_forward_and_backward_alone_of_some_layers_of_nemotron(tmp_path):
    options = ["--work", "nemotron-3-nano", "--layers", "7", "--no-update", "--routings", "random-init"]
    arms = ["--arms", "stock", "expertmesh-ep-recompute"]
    rows = on_two_ranks("gpus.py", tmp_path / "result.json", *options, *arms, *SMALL)["rows"]
    assert [(row["arm"], row["layers"]) for row in rows] == [("stock", 7), ("expertmesh-ep-recompute", 7)]
    for row in rows:
        assert "clip_ms" not in row and 0 < row["forward_ms"] + row["backward_ms"] <= 1.5 * row["step_ms"]


def test_exchanges_alone(tmp_path):
    rows = on_two_ranks("exchanges.py", tmp_path / "result.json", "--tiny", "--repeats", "1")["exchanges"]
    assert {(row["link"], row["exchange"]) for row in rows} == {
        ("c10d", "all-to-all"), ("NCCL", "gather"), ("NCCL", "scatter"), ("this GPU alone", "combine"),
    }  # fmt: skip
    assert all(row["us"] > 0 for row in rows)


def test_what_stands_when_memory_is_highest(rows):
    found = rows("peak_memory")
    assert [row["arm"] for row in found] == ["expertmesh", "stock"] * (len(found) // 2) and len(found) >= 6
    assert all(row["planned_gib"] > 0 for row in found[::2])


def test_experts_in_4_bits(rows):
    found = rows("four_bit", "--formats", "nf4", "--batch", "1", "--layers", "1")
    assert [(row["format"], row["batch"]) for row in found] == [("nf4", 1)]
    assert len(found[0]["losses"]) == 3 and found[0]["step_ms"] > 0


def test_quality_trains_by_small_states_and_released_gradients(script, tmp_path, monkeypatch):
    quality = script("quality")
    (tmp_path / "some.py").write_text("print(1)\n" * 2000)
    monkeypatch.setattr(quality, "FOLDERS", [tmp_path])
    data = quality.text(40, 64)
    assert data.shape == (40, 64) and data.max() < quality.VOCABULARY
    arms = [("float32", None), ("8bit", "running")]
    rows = list(quality.together([quality.training(data, quality.TINY, *arm, 0, 2) for arm in arms]))
    assert [row["arm"] for row in rows] == ["float32", "8bit-running"]
    for row in rows:
        assert [point["step"] for point in row["curve"]][-3:] == [16, 18, 19]  # the 38 rows that are not held out
        assert 0 < row["held_out_loss"] < 9
    with pytest.raises(ValueError, match="fewer steps"):
        quality.text(2000, 64)


def test_quality_compares_losses_with_those_of_standing_gradients_and_float32(script):
    quality = script("quality")
    losses = {("float32", 0): 2.0, ("float32", 1): 3.0, ("8bit", 0): 2.02, ("8bit", 1): 2.98}
    rows = [{"arm": arm, "seed": seed, "held_out_loss": loss} for (arm, seed), loss in losses.items()]
    assert quality.compared(rows) == [
        {"arm": "float32", "held_out_loss": 2.5, "percent_above": 0.0, "of_seeds": [0.0, 0.0]},
        {"arm": "8bit", "held_out_loss": 2.5, "percent_above": 0.0, "of_seeds": [1.0, -0.667]},
    ]
    assert [quality.rate(step, 2000) for step in (0, 99)] == [quality.PEAK_LR / 100, quality.PEAK_LR]
    assert quality.rate(1999, 2000) < quality.PEAK_LR / 1000
