"""transformers' own model tests must not fail for our classes where they pass for theirs."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.acceptance.suite import ROOT, Unavailable, fetch

CASES = Path(__file__).with_name("cases.py")


def start(package: Path, side: str, report: Path) -> subprocess.Popen:
    """Run the classes of cases.py that are `Stock` or `Ours`; results go to `report` as JUnit XML."""
    command = [sys.executable, "-m", "pytest", "-c", str(CASES.with_suffix(".ini")), "--rootdir", str(ROOT)]
    command += [str(CASES), "-k", side, f"--junitxml={report}", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(package), str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(report: Path, side: str) -> dict[str, str]:
    """`Family::test` -> `passed`, `skipped`, or the first line of its failure."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = (child.get("message") or child.tag).splitlines()[0][:200]
            elif child.tag == "skipped" and outcome == "passed":
                outcome = "skipped"
        family = case.get("classname", "").rpartition(".")[2].removeprefix(side)
        name = f"{family}::{case.get('name')}"
        if found.get(name, "passed") in ("passed", "skipped"):  # subtests are reported under their test's name
            found[name] = outcome
    return found


def test_transformers_suite_fails_nowhere_that_stock_passes(tmp_path):
    try:
        package = fetch()
    except Unavailable as reason:
        pytest.skip(str(reason))
    reports = {side: tmp_path / f"{side}.xml" for side in ("Stock", "Ours")}
    runs = {side: start(package, side, report) for side, report in reports.items()}
    outputs = {side: run.communicate(timeout=1200)[0] for side, run in runs.items()}
    for side, report in reports.items():
        assert report.exists(), f"{side} did not run:\n{outputs[side][-3000:]}"
    stock, ours = (results(report, side) for side, report in reports.items())
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    ours_passed = sum(outcome == "passed" for outcome in ours.values())
    print(f"{len(stock)} of transformers' tests: the stock classes pass {len(passed)}, ours pass {ours_passed}")
    assert len(passed) > 400, f"the suite itself is broken here:\n{outputs['Stock'][-3000:]}"
    worse = {name: ours.get(name, "did not run") for name in passed if ours.get(name) != "passed"}
    assert not worse, f"transformers' tests that pass for the stock class and not for ours: {worse}"
