"""The page of families is what its generator writes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _families():
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_the_models_report():
    pytest.importorskip("liger_kernel")
    families = _families()
    assert families.PAGE.read_text() == families.page(), "run PYTHONPATH=src python scripts/families.py"


def test_every_fusion_is_explained():
    families = _families()
    assert set(families.WHAT) == set(families.fusions()), "say in scripts/families.py what a new fusion does"
