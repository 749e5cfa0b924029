"""The script that trains a whole model on all GPUs of a node runs, here on two processes and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows_of(out: Path, *options: str) -> list[dict]:
    """The rows that the script writes on two processes."""
    script = str(ROOT / "benchmarks" / "eight_gpus.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*launcher, script, *options, "--batches", "1", "--seq", "16", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=200,
    )
    result = json.loads(out.read_text())
    assert result["gpus"] == 0
    return result["rows"]


def test_a_row_for_each_arm_with_all_phases_of_a_step(tmp_path):
    rows = rows_of(tmp_path / "result.json", "--routings", "balanced", "--arms", "stock-ep", "expertmesh-ep")
    assert [row["arm"] for row in rows] == ["stock-ep", "expertmesh-ep"]
    for row in rows:
        phases = row["forward_ms"] + row["backward_ms"] + row["clip_ms"] + row["optimizer_ms"]
        assert 0 < phases <= 1.5 * row["step_ms"] and row["tokens_per_second_per_gpu"] > 0


def test_forward_and_backward_alone_of_some_layers_of_nemotron(tmp_path):
    options = ["--work", "nemotron-3-nano", "--layers", "7", "--no-update", "--routings", "random-init"]
    rows = rows_of(tmp_path / "result.json", *options, "--arms", "stock", "expertmesh-ep")
    assert [(row["arm"], row["layers"]) for row in rows] == [("stock", 7), ("expertmesh-ep", 7)]
    for row in rows:
        assert "clip_ms" not in row and 0 < row["forward_ms"] + row["backward_ms"] <= 1.5 * row["step_ms"]
