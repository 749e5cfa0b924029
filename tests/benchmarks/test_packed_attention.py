"""The script that times attention over packed documents runs."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packed_attention.py"


def test_packed_attention_benchmark_writes_a_row_per_arm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("packed_attention", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "packed.json"
    options = ["--tokens", "128", "--heads", "8", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/packed_attention.py", *options])
    script.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["transformers", "expertmesh", "unpacked"] * 2
    assert {row["work"] for row in rows} == {"qwen3-30b-a3b", "deepseek-v3"}
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in rows)
