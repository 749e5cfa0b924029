"""The script that measures clipping and AdamW runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from expertmesh.kernels import adamw, clip, tensor_lists

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("optimizer", BENCHMARKS / "optimizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_per_size_arm_and_part(script, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/optimizer.py", "--tiny", "--repeats", "1", "--out", str(out)])
    script.main()
    copy, *rows = json.loads(out.read_text())["rows"]
    assert copy["copy_tb_per_s"] >= 0 and len(rows) == 2 * 2 * 3
    assert {(row["layers"], row["arm"], row["part"]) for row in rows} == {
        (layers, arm, part) for layers in (1, 2) for arm in ("torch", "expertmesh") for part in script.PARTS
    }
    assert all(row["ms"] > 0 and row["parameters"] > 1000 for row in rows)


def test_a_sweep_leaves_the_kernels_as_they_are_shipped(script, capsys, monkeypatch):
    before = tensor_lists.CHUNK, dict(adamw.OPTIONS), dict(clip.OPTIONS)
    monkeypatch.setattr(sys, "argv", ["benchmarks/optimizer.py", "--tiny", "--sweep", "--repeats", "1"])
    script.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [row["kernel"] for row in rows] == ["adamw", "squared_sum"] and all(row["best_first"] for row in rows)
    assert before == (tensor_lists.CHUNK, adamw.OPTIONS, clip.OPTIONS)


def test_the_shapes_are_those_of_the_model(script):
    """Eight layers are 5.6e9 parameters, all 48 are 30.5e9."""
    assert sum(script.math.prod(shape) for shape in script.shapes(8, tiny=False)) == pytest.approx(5.6e9, rel=0.01)
    assert sum(script.math.prod(shape) for shape in script.shapes(48, tiny=False)) == pytest.approx(30.5e9, rel=0.01)
