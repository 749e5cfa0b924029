"""Every script of benchmarks/ runs, here with small sizes on a CPU, and writes its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def arms_of(found: list[dict]) -> dict[str, list[str]]:
    """The implementations of each case, all of which were timed."""
    assert all(row["ms"] > 0 and row["floor_ms"] >= 0 for row in found)
    arms: dict[str, list[str]] = {}
    for row in found:
        if row["implementation"] not in arms.setdefault(row["kernel"], []):
            arms[row["kernel"]].append(row["implementation"])
    return arms


def test_attention(rows):
    found = rows("attention")
    arms = arms_of(found)
    packed = [f"packed {work}{rows}" for work in ("qwen3-30b-a3b", "deepseek-v3") for rows in ("", ": unpacked")]
    sinks = [f"sinks {work}" for work in ("full", "window", "packed full", "packed window")]
    assert list(arms) == ["documents", *packed, *sinks]
    assert arms["documents"] == arms[packed[0]] == ["transformers", "expertmesh"]
    assert arms["sinks window"] == ["expertmesh"]
    passes = [row["pass"] for row in found if row["kernel"] == "sinks full"]
    assert passes == ["forward", "backward", "both"]


def test_arms_of_packed_attention_compute_the_same(script):
    for case in script("attention").packed_cases(True):
        if len(case.arms) == 2 and case.name != "documents":
            theirs, ours = (fn(*case.inputs) for fn in case.arms.values())
            assert torch.allclose(theirs, ours, atol=2e-2), case.name


def test_pairs_that_see_each_other(script):
    """Half of a square, the sum over documents, a band below a window."""
    visible_pairs = script("attention").visible_pairs
    assert (
        visible_pairs([10]) == 50
        and visible_pairs([6, 4]) == 26
        and visible_pairs([10], window=2) == 18
        and visible_pairs([10], window=10) == 50
    )


def test_simulated_ranks(rows):
    found = rows("simulate")
    assert [row["ranks"] for row in found] == [8] * 3
    assert all(row["sent_gb"] and row["step_s"][0] <= row["step_s"][1] for row in found)


def test_experts(rows, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # by the references: the interpreter takes minutes
    arms = arms_of(rows("experts"))
    layer = ["stock", "expertmesh", "expertmesh-triton"]
    for tokens in (16, 24):
        assert arms[f"experts, random {tokens}"] == arms[f"experts, zipf {tokens}"] == layer
        assert arms[f"adapters, {tokens}"] == ["expertmesh", "whole", "without"]
    kernels = {name: found for name, found in arms.items() if name.startswith("kernel")}
    assert len(kernels) == 6 and kernels["kernel up_wgrad"] == ["expertmesh"]


def test_small_kernels(rows, script):
    names = [case.name for case in script("small_kernels").cases(True)]
    found = rows("small_kernels", "--only", ",".join(name for name in names if not name.startswith("mamba2")))
    passes = {(row["kernel"], row["pass"]) for row in found if row["implementation"] == "expertmesh"}
    assert {row["implementation"] for row in found} == {"expertmesh", "torch", "copy"}
    assert {("rope", "backward"), ("combine", "forward"), ("clip and adamw", "forward")} <= passes
    assert {what for kernel, what in passes if kernel.startswith("linear")} == {"both"}
    assert {name for name in names if name not in dict(passes)} == {name for name in names if "mamba2" in name}
    assert {row["kernel"] for row in rows("small_kernels", "--only", "swiglu,relu")} == {"swiglu", "relu2"}


def test_mamba(script, monkeypatch):
    """In Triton's interpreter its kernels are slow, so here the references stand for them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = script("small_kernels")
    cases = {case.name: case for case in kernels.mamba_cases(kernels.Sizes(1, 24, 2, 8, 1, 8), False)}
    assert list(cases) == ["mamba2 conv", "mamba2 scan", "mamba2 norm", "mamba2 mixer"]
    for case in cases.values():
        found = script("shared").forward_backward(case.arms["torch"], case.inputs, 1)
        assert found["forward"][0] > 0 and found["backward"][0] > 0 and case.floors[1] > case.floors[0] > 0


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


def test_adapters_over_experts_in_4_bits_are_a_run_too(rows, tmp_path):
    small = "train.gradient_release=null", "train.optim_states=null", "data.max_length=32", "train.max_steps=5"
    adapters = "lora={r: 4, target_parameters: [experts.gate_up_proj, experts.down_proj]}"
    widths = '{"hidden_size": 64, "moe_intermediate_size": 64}'
    keys = [*small, "train.per_device_train_batch_size=2", "quantization.experts=nf4", adapters]
    (row,) = rows("train_run", "--folder", str(tmp_path), "--widths", widths, "--keys", *keys)
    assert row["arm"] == "ordinary" and row["step_ms"] > 0 and len(row["losses"]) == 5


def test_inputs_alone_of_a_run_without_a_network(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/train_run.py", "--inputs-only", "--folder", str(tmp_path)])
    script("train_run").main()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 48 and config["hidden_size"] == 2048
    assert all(len(json.loads(line)["text"]) == 20_000 for line in (tmp_path / "text.jsonl").open())


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
