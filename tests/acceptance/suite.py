"""transformers' own model tests, fetched when they are needed: the PyPI sdist of the installed version ships them, the
wheel does not.

The sdist lacks four helper modules that its tests import. `unpack` writes stand-ins for them: two empty mixins (export
and generation tests, which need files that are not in the sdist), an empty table, and a function this suite never
calls.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".acceptance"
PACKAGE = "hf_tests"
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": "run_distributed = None\n",
}


class Unavailable(Exception):
    """The sdist cannot be fetched here; the message says why."""


def fetch() -> Path:
    """The folder to put on the import path so that `import hf_tests` works; downloads once per transformers version."""
    version = importlib.metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    if not (folder / PACKAGE / "__init__.py").exists():
        sdist = CACHE / f"transformers-{version}.tar.gz"
        if not sdist.exists():
            _download(version)
        unpack(sdist, folder / PACKAGE)
    return folder


def _download(version: str) -> None:
    # --no-build-isolation: pip asks the sdist for its metadata, and the setuptools that needs is here already
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--dest", str(CACHE), f"transformers=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip could not download the sdist of transformers {version}: {done.stderr.strip()[-500:]}")


def unpack(sdist: Path, target: Path) -> None:
    """Write the sdist's tests/*.py and the stand-ins into `target`, as a package. `__init__.py` comes last: it marks
    completeness.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            if member.isfile() and path.parts[1:2] == ("tests",) and len(path.parts) == 3 and path.suffix == ".py":
                content = archive.extractfile(member)
                assert content is not None
                (target / path.name).write_bytes(content.read())
    for name, text in STAND_INS.items():
        file = target / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    (target / "__init__.py").touch()


def start(arguments: list[str], path: list[Path], folder: Path, report: Path, **environment: str) -> subprocess.Popen:
    """pytest with these arguments and import path in `folder`; results go to `report` as JUnit XML."""
    command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}", "-q", "-p", "no:cacheprovider"]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(report: Path, side: str = "") -> dict[str, str]:
    """`Class::test` -> `passed`, `skipped`, or the first line of its failure; the class without `side` before it."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = (child.get("message") or child.tag).splitlines()[0][:200]
            elif child.tag == "skipped" and outcome == "passed":
                outcome = "skipped"
        cls = case.get("classname", "").rpartition(".")[2].removeprefix(side)
        name = f"{cls}::{case.get('name')}"
        if found.get(name, "passed") in ("passed", "skipped"):  # subtests are reported under their test's name
            found[name] = outcome
    return found


def compared(stock: dict[str, str], ours: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A line of counts; and the tests that stock passes and we do not, each with what became of it."""
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    ours_passed = sum(outcome == "passed" for outcome in ours.values())
    line = f"{len(stock)} of transformers' tests: the stock classes pass {len(passed)}, ours pass {ours_passed}"
    return line, {name: ours.get(name, "did not run") for name in passed if ours.get(name) != "passed"}
