"""The script that times attention with sinks runs."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sink_attention.py"


def test_sink_attention_benchmark_writes_a_row_per_arm_and_a_sweep(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("sink_attention", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def rows(*options: str) -> list[dict]:
        sizes = ["--rows", "1", "--length", "64", "--heads", "8", "--width", "16", "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", ["sink_attention.py", *sizes, *options, "--out", str(tmp_path / "out.json")])
        script.main()
        return json.loads((tmp_path / "out.json").read_text())["rows"]

    table = rows()
    assert [row["work"] for row in table][:1] == ["full"] and table[-1]["arm"] == "eager"
    assert all(row["forward_ms"] > 0 and max(row["error"]) < 0.05 for row in table if "(no sinks)" not in row["arm"])
    assert [row["windowed"] for row in rows("--sweep", "dkdv")] == [False, True]
