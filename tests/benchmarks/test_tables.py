"""The pages with figures are what the committed result files say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.bench.run import BenchOptions, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("tables", "tables_gpus", "tables_loops", "tables_shared"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("tables")


def test_docs_and_readme_show_the_committed_results(tables):
    assert (ROOT / "docs" / "benchmarks.md").read_text() == tables.page(), "run python benchmarks/tables.py"
    assert (ROOT / "README.md").read_text() == tables.readme(), "run python benchmarks/tables.py"


def test_every_result_names_a_commit_of_this_history(tables):
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("needs a git checkout with its whole history")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        commit = result.get("landed_as", result["commit"])
        assert subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT).returncode == 0, path.name


def test_the_profile_page_shows_the_committed_profile(tables):
    page = ROOT / "docs" / "profile.md"
    assert page.read_text() == tables.profile_page(tables.load("h200_profile")), "run python benchmarks/tables.py"


def test_results_of_the_bench_make_tables(tables):
    options = BenchOptions(
        tiny=True, arms=("stock", "expertmesh"), batches=(2,), seq=32, layers=1, full=True, ablate=True,
        profile=True, warmup=1, repeats=1, device="cpu",
    )  # fmt: skip
    result = run(options, say=lambda line: None)
    steps = tables.step_table(result)
    assert "| expertmesh | 2 x 32 |" in steps and "| clip ms | optimizer ms |" in steps and "-no-" not in steps
    assert "| `router` |" in tables.worth_table(result["rows"])
    page = tables.profile_page(result)
    assert "qwen3-30b-a3b, random-init routing, 1 layers, 2 x 32 tokens: expertmesh" in page
    assert "| loss head |" in page and "| **all** |" in page
    # what is measured on a GPU only
    result["parity"]["qwen3-30b-a3b"]["expertmesh"] |= {"worst_ratio": 1.25, "worst_tensor": "lm_head.weight"}
    assert "at most 1.25 times stock's (`lm_head.weight`)" in tables.parity_text(result, "qwen3-30b-a3b")


def test_a_section_is_there_if_its_result_is(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["tables_shared"], "RESULTS", tmp_path)
    monkeypatch.setitem(tables.SECTIONS, "some", ("Title", "What it is.", tables.times_table))
    assert tables.section("some") == ""
    heading = {"hardware": "H200", "gpus": 1, "torch": "2", "commit": "c" * 40, "command": "python some.py"}
    rows = [{"arm": "a", "forward_ms": 1.5}, {"arm": "b", "failed": "no"}, {"arm": "a", "errors": [0.1]}]
    (tmp_path / "some.json").write_text(json.dumps(heading | {"rows": rows}))
    text = tables.section("some")
    assert text.startswith("## Title\n\nWhat it is.\n\n| arm | forward ms | failed |") and "python some.py" in text
    assert "| a | 1.5 |  |" in text and "| b |  | no |" in text and "0.1" not in text


def test_loops_come_first_where_they_are_measured(tables, tmp_path, monkeypatch):
    loops = sys.modules["tables_loops"]
    monkeypatch.setattr(sys.modules["tables_shared"], "RESULTS", tmp_path)
    assert loops.readme_of_loops() == loops.loops_section() == ""
    options = BenchOptions(
        tiny=True, arms=("stock", "expertmesh"), loops=("trainer",), batches=(1, 2), seq=32, warmup=1, repeats=2,
        device="cpu", commit="c" * 40, out=str(tmp_path / "some.json"),
    )  # fmt: skip
    result = run(options, say=lambda line: None)
    for row, ms, gib in zip(result["rows"], (40.0, 10.0, 80.0, 16.0), (4.5, 1.5, 8.5, 2.5), strict=True):
        row |= {"step_ms": ms, "peak_gib": gib}
    compiled = result["rows"][0] | {"arm": "stock-compiled", "step_ms": 25.0, "peak_gib": 3.5}
    result["rows"].append(compiled)
    failure = {"work": "qwen3-30b-a3b", "arm": "expertmesh-trainer", "error": "OutOfMemoryError: CUDA"}
    result["failed"] = [failure | {"what": "trainer, 2 x 32"}, failure | {"what": "trainer, 1 x 32", "error": "Bug: 1"}]
    (tmp_path / "some.json").write_text(json.dumps(result))
    text = loops.readme_of_loops()
    assert "| trainer | 1 x 32 | 40.0 | 25.0 (compiled) | 10.0 | failed | 4.00x | 2.50x | 4.5 | 3.5 | 1.5 |" in text
    assert "| trainer | 2 x 32 | 80.0 | 80.0 (stock) | 16.0 | out of memory | 5.00x | 5.00x | 8.5 | 8.5 | 2.5 |" in text
    assert "qwen3-30b-a3b widths, 3 layers" in text and "commit `cccccccccc`" in text
    assert loops.loops_section().count("| trainer |") == 5


def test_kernels_of_a_library_stand_beside_ours(tables):
    result = {"kernels": {"down": {"ms": 0.75, "tflops": 550.0}, "up_act": {"ms": 1.5, "tflops": 540.0}}}
    assert "| kernel | ms | TFLOP/s |" in tables.kernels_text(result)
    down = {"ms": 0.6, "tflops": 687.5, "config": "128x192", "tried": []}
    result |= {"quack-kernels": "0.6.5", "libraries": {"quack": {"down": down, "up_act": {"tried": []}}}}
    text = tables.kernels_text(result)
    assert "quack-kernels 0.6.5" in text and "| kernel | ours ms | TFLOP/s | quack ms |" in text
    assert "| `down` | 0.75 | 550.0 | 0.6 | 687.5 | 1.25 |" in text
    assert "| `up_act` | 1.5 | 540.0 | failed |  |  |" in text


def test_every_result_says_where_it_comes_from():
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert {"hardware", "gpus", "torch", "triton", "commit", "command", "rows"} <= set(result), file.name
        assert len(result["commit"]) == 40, file.name
        assert not any(place in result["command"] for place in ("/tmp", "/root")), file.name
