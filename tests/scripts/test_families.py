"""The page of families is what its generator writes, on the oldest Transformers as on the newest."""

import importlib.util
from pathlib import Path

import transformers

from expertmesh import backends

ROOT = Path(__file__).parents[2]


def _families():
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_the_models_report():
    families = _families()
    assert families.PAGE.read_text() == families.page(), (
        f"these are not the tables of Transformers {transformers.__version__}: run PYTHONPATH=src python "
        f"scripts/families.py; it must write the same page on {backends.OLDEST} and {backends.NEWEST}"
    )


def test_every_fusion_is_explained():
    families = _families()
    assert set(families.WHAT) == set(families.FUSIONS), "say in scripts/families.py what a new fusion does"


def _blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "add-a-family.md").read_text()
    return [part.split("```")[0].strip("\n") for part in page.split(f"```{language}\n")[1:]]


def test_the_code_on_the_page_for_a_new_family_is_the_code_that_runs():
    quoted, scripts = 0, {}
    for block in _blocks("python"):
        first, _, rest = block.partition("\n")
        if first.startswith("# src/"):
            assert rest in (ROOT / first.removeprefix("# ")).read_text(), block
            quoted += 1
        else:
            exec(block, scripts)
    assert quoted == 3 and "fingerprint" in scripts


def test_the_files_and_tests_that_the_page_names_exist():
    (commands,) = _blocks("bash")
    page = (ROOT / "docs" / "add-a-family.md").read_text()
    for path in [word for word in commands.split() if word.startswith("tests/")]:
        assert (ROOT / path).exists() and path in page
