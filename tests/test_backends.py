"""What is said about the Transformers in use: tested versions in silence, any other in one line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from expertmesh import backends
from tests.models import load_ours

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["triton", "liger-kernel", "matplotlib"])
def test_nothing_is_missing_without_which_tests_are_skipped(package):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = (one for one in map(Requirement, extras["dev"] + extras["plots"]) if one.name == package)
    here = wanted.marker is None or wanted.marker.evaluate()
    assert not here or backends.version_of(package), "pip install --editable '.[dev]'"


_WITHOUT_TRITON = """
import importlib.util, pkgutil
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch, expertmesh
from expertmesh import AutoModelForCausalLM, backends
from expertmesh.bench.tiny import tiny_config
from expertmesh.plan.memory import Job, trace
assert not backends.HAS_TRITON
for module in pkgutil.walk_packages(expertmesh.__path__, "expertmesh."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for family in ("qwen3_moe", "nemotron_h"):
    model, ids = AutoModelForCausalLM.from_config(tiny_config(family)).train(), torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trace(Job(tiny_config(family), batch=1, seq=128), 140 * 2**30)
"""


def test_without_triton_everything_imports_trains_on_the_cpu_and_is_planned():
    subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], check=True)


@pytest.fixture
def said(monkeypatch):
    """What the log says."""
    lines = []
    monkeypatch.setattr(backends.logger(), "warning", lines.append)
    monkeypatch.setattr(backends, "_warned", set())
    return lines


@pytest.mark.parametrize("version", ["5.23.0", "5.23.4", "5.24.0", "5.24.1.dev0"])
def test_a_tested_version_needs_no_words(monkeypatch, said, version):
    monkeypatch.setattr("transformers.__version__", version)
    backends.warn_if_untested()
    assert said == []


@pytest.mark.parametrize("version", ["5.22.9", "5.25.0.dev0", "5.25.0", "6.0.0"])
def test_an_untested_version_is_named_once_with_the_tested_ones(monkeypatch, said, version):
    monkeypatch.setattr("transformers.__version__", version)
    for _ in range(2):
        backends.warn_if_untested()
    (line,) = said
    assert f"Transformers {version}, only on 5.23.0 to 5.24:" in line and "\n" not in line


SLOW = {
    "the norm of a decoder layer is watched": ("qwen3_moe", "model.layers.0.post_attention_layernorm", {}),
    "a part of Mamba2 is watched": ("nemotron_h", "model.layers.0.mixer.norm", {}),
    "attention drops out": ("mixtral", None, {"attention_dropout": 0.5}),
}


@pytest.mark.parametrize("case", SLOW)
def test_a_slow_way_is_told_once(said, case):
    family, part, changes = SLOW[case]
    model, ids = load_ours(family, **changes).train(), torch.arange(12)[None]
    inputs = {"input_ids": ids, "labels": ids}
    if part is None:
        inputs["position_ids"] = ids % 6  # two documents
    else:
        model(**inputs)
        assert said == []
        model.get_submodule(part).register_forward_hook(lambda *_: None)
    for _ in range(2):
        model(**inputs)
    assert len(said) == 1 and type(model.model.layers[0]).__name__[:5] in said[0], said


def test_the_suite_runs_on_a_version_that_counts_as_tested():
    assert backends.is_tested(transformers.__version__)


def test_the_package_requires_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "transformers"]
    major, minor = backends.NEWEST_MINOR
    assert required.specifier == SpecifierSet(f">={backends.OLDEST.removesuffix('.0')},<{major}.{minor + 1}")
