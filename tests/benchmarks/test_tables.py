"""The pages with figures are what the committed result files say."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from expertmesh.bench.run import BenchOptions, run

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def tables(script):
    return script("tables")


@pytest.fixture
def written(tables, tmp_path, monkeypatch):
    """Writes a result where the tables read it."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    heading = {"hardware": "H200", "gpus": 1, "torch": "2", "commit": "c" * 40, "command": "python some.py"}
    return lambda **content: (tmp_path / "some.json").write_text(json.dumps(heading | content))


def test_docs_and_readme_show_the_committed_results(tables):
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page.read_text()), f"{page}: run python benchmarks/tables.py"


def test_every_table_is_between_marks_and_every_result_on_a_page(tables):
    text = "".join(page.read_text() for page in tables.PAGES)
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(tables.BLOCK.findall(text)) > 30
    directives = [directive for _, directive, _ in tables.BLOCK.findall(text)]
    named = {word.partition(":")[0] for directive in directives for word in re.split("[ +]", directive)}
    assert not {path.stem for path in RESULTS} - named
    assert not {name for name in tables.TABLES if name not in named}


def test_no_row_of_a_benchmark_page_is_typed_by_hand(tables):
    """Outside the marks the pages of benchmarks have no cell that is a number."""
    for page in [*(ROOT / "docs" / "benchmarks").glob("*.md"), ROOT / "docs" / "what-did-not-help.md"]:
        rest = tables.BLOCK.sub("", page.read_text())
        assert not re.search(r"^\|.*\| *[\d.,]+(x| ms|)? *\|", rest, re.MULTILINE), page.name


def test_every_result_names_a_commit_of_this_history():
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("needs a git checkout with its whole history")
    for path in RESULTS:
        result = json.loads(path.read_text())
        commit = result.get("landed_as", result["commit"])
        assert subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT).returncode == 0, path.name


def test_every_result_says_where_it_comes_from():
    for path in RESULTS:
        result = json.loads(path.read_text())
        assert {"hardware", "gpus", "torch", "triton", "commit", "command", "rows"} <= set(result), path.name
        assert len(result["commit"]) == 40, path.name
        assert not any(place in result["command"] for place in ("/tmp", "/root")), path.name


def test_results_of_the_bench_make_tables(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    options = BenchOptions(
        tiny=True, arms=("stock", "expertmesh"), batches=(2,), seq=32, layers=1, full=True, ablate=True,
        profile=True, warmup=1, repeats=1, device="cpu", out=str(tmp_path / "some.json"),
    )  # fmt: skip
    result = run(options, say=lambda line: None)
    steps = tables.steps("some")
    assert "qwen3-30b-a3b, 1 layers, random-init routing" in steps and "-no-" not in steps
    assert "| expertmesh | 2 x 32 |" in steps and "| clip ms | AdamW ms | step ms |" in steps and "| 1.00x |" in steps
    assert "| expertmesh |" not in tables.steps("some", "expertmesh")
    assert "| `router` |" in tables.worth("some") and "| `experts` |" in tables.worth("some")
    assert "| loss head |" in tables.components("some", "expertmesh") and "| **all** |" in tables.components(
        "some", "stock"
    )
    # what is measured on a GPU only
    result["parity"]["qwen3-30b-a3b"]["expertmesh"] |= {"worst_ratio": 1.25, "worst_tensor": "lm_head.weight"}
    (tmp_path / "some.json").write_text(json.dumps(result))
    assert "| 1.25x | `lm_head.weight` |" in tables.proof("some")


def test_rows_with_times_make_a_table(tables, written):
    written(rows=[{"arm": "a", "forward_ms": 1.5}, {"arm": "b", "failed": "no"}, {"arm": "a", "errors": [0.1]}])
    text = tables.filled("A\n<!-- table: rows some -->\nold\n<!-- end of table -->\nB\n")
    assert text.startswith("A\n<!-- table: rows some -->\n\n| arm | forward ms | failed |") and "python some.py" in text
    assert "| a | 1.5 |  |" in text and "| b |  | no |" in text and "0.1" not in text and "old" not in text
    assert text.endswith("<!-- end of table -->\nB\n") and tables.filled(text) == text


def test_loops_stand_beside_the_best_arm_of_stock(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
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
    text = tables.loops("some")
    assert "| trainer | 1 x 32 | 40.0 | 25.0 (compiled) | 10.0 | failed | 4.00x | 2.50x | 4.5 | 3.5 | 1.5 |" in text
    assert "| trainer | 2 x 32 | 80.0 | 80.0 (stock) | 16.0 | out of memory | 5.00x | 5.00x | 8.5 | 8.5 | 2.5 |" in text
    assert "commit `cccccccccc`" in text and tables.arms_of_loops("some").count("| trainer |") == 5


def test_rows_by_another_key_and_those_that_have_a_column_make_a_table(tables, written):
    written(rows=[{"arm": "a", "step_ms": 3}, {"arm": "b", "step_ms": 4, "trace": {"idle_ms": 1}}],
            kernels={"down": {"ms": 0.75, "tflops": 550.0}, "up_act": {"ms": 1.5, "tflops": 540.0}})  # fmt: skip
    text = tables.rows("some:kernels")
    assert "| kernel | ms | tflops |\n" in text and "| `down` | 0.75 | 550.0 |" in text
    assert "| b | 1 |" in tables.rows("some", "arm", "idle_ms") and "| a |" not in tables.rows("some", "arm", "idle_ms")


def test_cases_have_a_column_for_each_implementation(tables, written):
    timed = [("up", "torch", "forward", 2.0), ("up", "torch", "both", 3.0), ("up", "ours", "forward", 1.0),
             ("loss", "ours", "both", 5.0)]  # fmt: skip
    written(
        rows=[dict(zip(("kernel", "implementation", "pass", "ms"), row, strict=True), floor_ms=0.5) for row in timed]
    )
    assert tables.cases("some").startswith("| kernel | pass | floor ms | torch | ours |")
    assert "| up | forward | 0.5 | 2.0 | 1.0 |\n| loss | both | 0.5 |  | 5.0 |" in tables.cases("some")
