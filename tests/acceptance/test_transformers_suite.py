"""transformers' own model tests must not fail for our classes where they pass for theirs: ours run all of them, theirs
those that ours did not pass."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.suite import CACHE, ROOT, Unavailable, compared, fetch, results, start

CASES = Path(__file__).with_name("cases.py")
#: they ask for the name "sdpa" in the configuration, where ours says "expertmesh" (layers/attention.py)
BY_NAME = ("test_sdpa_can_dispatch_non_composite_models", "test_can_set_attention_dynamically")


def test_transformers_suite_fails_nowhere_that_stock_passes(tmp_path):
    try:
        package = fetch()
    except Unavailable as reason:
        pytest.fail(f"{reason} Put that archive into {CACHE}, or leave `make acceptance` out.")
    path = [package, ROOT / "src", ROOT]

    def run(name: str, *arguments: str) -> dict[str, str]:
        report = tmp_path / f"{name}.xml"
        settings = ["-c", str(CASES.with_suffix(".ini")), "--rootdir", str(ROOT), "-n", "2"]
        output = start([*settings, *arguments], path, ROOT, report).communicate(timeout=1200)[0]
        assert report.exists(), f"{name} did not run:\n{output[-3000:]}"
        return results(report, name)

    ours = run("Ours", str(CASES), "-k", "Ours")
    passed = [test for test, outcome in ours.items() if outcome == "passed"]
    assert len(passed) > 400, f"the suite itself is broken here: {ours}"
    stock = run("Stock", *(f"{CASES}::Stock{test}" for test in ours if test not in passed))
    _, worse = compared(stock, ours)
    worse = {test: outcome for test, outcome in worse.items() if not test.endswith(BY_NAME)}
    print(f"{len(ours)} of transformers' tests: ours pass {len(passed)}")
    assert not worse, f"transformers' tests that pass for the stock class and not for ours: {worse}"


FAKE_TESTS = """
import unittest
from transformers import GptOssConfig, GptOssForCausalLM

class GptOssModelTest(unittest.TestCase):
    def test_that_passes(self):
        GptOssForCausalLM(GptOssConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, head_dim=4, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        ))

    def test_that_fails(self):
        self.fail("on both sides")

    def test_that_fails_for_ours(self):
        self.assertFalse(hasattr(GptOssForCausalLM, "fusion_report"), "ours")
"""


def checkout(folder: Path, version: str) -> Path:
    """A transformers checkout of one family with three tests."""
    tests = folder / "tests" / "models" / "gpt_oss"
    (folder / "src" / "transformers").mkdir(parents=True)
    tests.mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    for package in (tests, tests.parent, tests.parent.parent):
        (package / "__init__.py").touch()
    (tests / "test_modeling_gpt_oss.py").write_text(FAKE_TESTS)
    return folder


def run_checkout(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tests" / "acceptance" / "checkout.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_checkout_is_run_twice_and_only_what_got_worse_is_named(tmp_path):
    folder = checkout(tmp_path / "transformers", importlib.metadata.version("transformers"))
    code, printed = run_checkout(str(folder), "gpt_oss")
    assert code == 1 and "3 of transformers' tests: the stock classes pass 2, ours pass 1" in printed, printed
    assert "GptOssModelTest::test_that_fails_for_ours" in printed and "::test_that_fails:" not in printed


def test_a_checkout_of_another_version_is_refused(tmp_path):
    code, printed = run_checkout(str(checkout(tmp_path, "5.0.0")), "gpt_oss")
    assert code == 2 and "git checkout v" in printed, printed
