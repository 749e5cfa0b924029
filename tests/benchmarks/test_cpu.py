"""On a CPU, too, the fast twin is the faster one; and the script that measures it runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("cpu", ROOT / "benchmarks" / "cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cpu_benchmark_writes_a_row_per_arm(tmp_path, monkeypatch):
    out, threads = tmp_path / "cpu.json", str(torch.get_num_threads())
    options = ["--tiny", "--batch", "1", "--seq", "32", "--rounds", "1", "--threads", threads, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/cpu.py", *options])
    _script().main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["stock-eager", "stock", "expertmesh"]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) for row in rows)


@pytest.mark.slow
def test_expertmesh_is_not_slower_than_stock_on_a_cpu():
    """Shortest of alternating steps, because other work may share the cores; the committed figure is 1.2 and more."""
    script = _script()
    models = script.build(script.CONFIG)
    ids = torch.randint(0, script.CONFIG["vocab_size"], (8, 256))
    steps = script.measure(models, ids, rounds=7)
    shortest = {arm: min(forward + backward for forward, backward, _ in steps[arm]) for arm in models}
    assert shortest["expertmesh"] < min(shortest["stock"], shortest["stock-eager"]), shortest
