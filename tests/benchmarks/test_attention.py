"""The script that compares kernels of causal attention runs."""

import importlib.util
import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_attention_benchmark_writes_a_row_per_shape_and_arm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("attention", BENCHMARKS / "attention.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "out.json"
    sizes = ["--length", "32", "--share", "16", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/attention.py", *sizes, "--out", str(out)])
    script.main()
    rows = json.loads(out.read_text())["rows"]
    assert {(row["work"], row["batch"]) for row in rows} == {(work, b) for work in script.SHAPES for b in (1, 4)}
    assert all(row["both_ms"] > 0 and max(row["error"]) < 0.02 for row in rows)
