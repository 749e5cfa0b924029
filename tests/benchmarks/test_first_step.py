"""The script that times first steps runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from expertmesh import cli

ROOT = Path(__file__).parents[2]


def test_first_step_benchmark_writes_a_row_for_each_cache(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("first_step", ROOT / "benchmarks" / "first_step.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "out.json"
    options = ["--works", "gpt-oss-20b", "--tiny", "--caches", str(tmp_path / "caches"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/first_step.py", *options])
    caches = []

    def in_this_process(command, env, **_):
        caches.append([env[name] for name in script.CACHES])
        assert command[:3] == [sys.executable, "-m", "expertmesh"]
        return SimpleNamespace(returncode=cli.run(command[3:]))

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=in_this_process))
    script.main()
    result = json.loads(out.read_text())
    assert [(row["work"], row["cache"]) for row in result["rows"]] == [
        ("gpt-oss-20b", "empty"), ("gpt-oss-20b", "warm"),
    ]  # fmt: skip
    assert all(row["first_step_s"] >= 0 for row in result["rows"])
    assert caches[0] == caches[1] and len({*caches[0]}) == 3, "the second finds what the first has compiled"
