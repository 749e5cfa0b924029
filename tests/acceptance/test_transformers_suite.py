"""transformers' own model tests must not fail for our Qwen3-MoE class where they pass for theirs."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.acceptance.suite import ROOT, Unavailable, fetch

CASES = Path(__file__).with_name("cases.py")


def start(package: Path, class_name: str, report: Path) -> subprocess.Popen:
    """Run one test class of cases.py; results go to `report` as JUnit XML."""
    command = [sys.executable, "-m", "pytest", "-c", str(CASES.with_suffix(".ini")), "--rootdir", str(ROOT)]
    command += [f"{CASES}::{class_name}", f"--junitxml={report}", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(package), str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(report: Path) -> dict[str, str]:
    """Test name -> `passed`, `skipped`, or the first line of its failure."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = (child.get("message") or child.tag).splitlines()[0][:200]
            elif child.tag == "skipped":
                outcome = "skipped"
        found[case.get("name", "")] = outcome
    return found


def test_transformers_suite_fails_nowhere_that_stock_passes(tmp_path):
    try:
        package = fetch()
    except Unavailable as reason:
        pytest.skip(str(reason))
    reports = {name: tmp_path / f"{name}.xml" for name in ("StockTest", "OursTest")}
    runs = {name: start(package, name, report) for name, report in reports.items()}
    outputs = {name: run.communicate(timeout=900)[0] for name, run in runs.items()}
    for name, report in reports.items():
        assert report.exists(), f"{name} did not run:\n{outputs[name][-3000:]}"
    stock, ours = results(reports["StockTest"]), results(reports["OursTest"])
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    print(
        f"{len(stock)} tests, stock passes {len(passed)}, ours {sum(outcome == 'passed' for outcome in ours.values())}"
    )
    assert len(passed) > 80, f"the suite itself is broken here:\n{outputs['StockTest'][-3000:]}"
    worse = {name: ours.get(name, "did not run") for name in passed if ours.get(name) != "passed"}
    assert not worse, f"transformers' tests that pass for the stock class and not for ours: {worse}"
