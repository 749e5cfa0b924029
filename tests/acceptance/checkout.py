"""Run the model tests of a transformers checkout on stock classes and on ours, and print where ours do worse.

    make mixins TRANSFORMERS=../transformers          # git checkout of the installed version

These are the tests of `tests/models/FAMILY`, with the generation and causal-LM mixins that the sdist lacks
(`make acceptance` runs what that has). The checkout is read, nothing is copied. Each family runs once with
transformers' own class and once with ours in its place (swapped_classes.py).
"""

import argparse
import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.acceptance.suite import compared, results, start  # noqa: E402

FAMILIES = {"gpt_oss": "GptOss", "deepseek_v3": "DeepseekV3", "nemotron_h": "NemotronH", "qwen3_moe": "Qwen3Moe"}


def why_not(checkout: Path) -> str | None:
    """Why these tests cannot be run, or None."""
    init, installed = checkout / "src" / "transformers" / "__init__.py", importlib.metadata.version("transformers")
    if not init.exists() or not (checkout / "tests" / "models").is_dir():
        return f"{checkout} is no checkout of transformers: clone https://github.com/huggingface/transformers."
    found = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE)
    if found is None or found[1] != installed:
        return f"The checkout is not of transformers {installed}, which is installed: git checkout v{installed} there."
    return None


def compare(checkout: Path, family: str, seconds: float) -> tuple[str, dict[str, str]]:
    """As `suite.compared`, for one family; raises RuntimeError if the tests did not run."""
    path, tests = [ROOT / "src", Path(__file__).parent], f"tests/models/{family}/test_modeling_{family}.py"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for side in ("stock", "ours"):
            report = Path(folder, f"{side}.xml")
            swapped = f"{FAMILIES[family]}ForCausalLM" if side == "ours" else ""
            run = start(["-p", "swapped_classes", tests], path, checkout, report, SWAPPED_CLASSES=swapped)
            output = run.communicate(timeout=seconds)[0]
            if not report.exists() or run.returncode not in (0, 1):
                raise RuntimeError(f"{family} did not run with {side} classes:\n{output[-3000:]}")
            found.append(results(report))
    return compared(*found)


def main() -> int:
    """Exit code: 0 if no test got worse, 1 if some did, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a transformers checkout of the installed version")
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--seconds", type=float, default=1800, help="time limit for one family and side")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(FAMILIES))
    problem = f"Unknown families: {', '.join(unknown)}." if unknown else why_not(arguments.checkout)
    if problem is not None:
        parser.error(problem)
    failed = False
    for family in arguments.families:
        line, worse = compare(arguments.checkout.resolve(), family, arguments.seconds)
        print(f"{family}: {line}")
        for name, outcome in worse.items():
            print(f"  {name}: {outcome}")
        failed |= bool(worse)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
