"""The script that trains a whole model on all GPUs of a node runs, here on two processes and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_row_for_each_arm_with_all_phases_of_a_step(tmp_path):
    script, out = str(ROOT / "benchmarks" / "eight_gpus.py"), tmp_path / "result.json"
    options = ["--batches", "1", "--seq", "16", "--routings", "balanced", "--arms", "stock-ep", "expertmesh-ep"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*launcher, script, *options, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=200,
    )
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["rows"]] == ["stock-ep", "expertmesh-ep"] and result["gpus"] == 0
    for row in result["rows"]:
        phases = row["forward_ms"] + row["backward_ms"] + row["clip_ms"] + row["optimizer_ms"]
        assert 0 < phases <= 1.5 * row["step_ms"] and row["tokens_per_second_per_gpu"] > 0
