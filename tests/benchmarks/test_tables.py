"""The pages with figures are what the committed result files say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_and_readme_show_the_committed_results():
    tables = _tables()
    assert (ROOT / "docs" / "benchmarks.md").read_text() == tables.page(), "run python benchmarks/tables.py"
    assert (ROOT / "README.md").read_text() == tables.readme(), "run python benchmarks/tables.py"


def test_every_result_says_where_it_comes_from():
    import json

    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert {"hardware", "gpus", "torch", "triton", "commit", "command", "rows"} <= set(result), file.name
        assert len(result["commit"]) == 40 and "/tmp" not in result["command"], file.name
