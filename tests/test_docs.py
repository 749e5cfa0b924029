"""The pages that a reader follows: links lead somewhere, the menu names every page, and what they tell one to do works.

So do the instructions in the texts of the package: its errors, warnings and help.
"""

import ast
import re
from pathlib import Path

import pytest
import typer

from expertmesh.cli import VERBS, _app
from expertmesh.train.config import Config, known_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere; from docs/ none may lead outside, where the site has nothing."""
    found = []
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        outside = page.is_relative_to(DOCS) and not file.is_relative_to(DOCS)
        missing_anchor = anchor and file.suffix == ".md" and file.exists() and anchor not in anchors(file)
        if outside or not file.exists() or missing_anchor:
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    assert not broken(page)


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#another) [c](gone.md) [d](https://example.org/gone)\n")
    assert broken(page) == ["#another", "gone.md"]


def test_the_menu_names_every_page():
    menu = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def texts() -> list[tuple[str, str]]:
    """(where, text) of every page, example, and string of the package."""
    pages = [(str(page.relative_to(ROOT)), page.read_text()) for page in [*PAGES, *ROOT.glob("examples/*.yaml")]]
    for path in sorted((ROOT / "src").rglob("*.py")):
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        pages += [(str(path.relative_to(ROOT)), text) for text in strings if isinstance(text, str)]
    return pages


def test_every_key_that_is_named_exists():
    keys = {key for key, _ in known_keys()} | {"model.mtp_loss_weight", "model.model"}  # attributes of a model
    sections = "|".join(Config.model_fields)
    named = [
        (where, key)
        for where, text in texts()
        for key in re.findall(rf"(?<![\w./-])((?:{sections})\.(?!py\b)[a-z][a-z_0-9]+)(?==|`)(?!`?\()", text)
        if not where.startswith("docs/benchmarks/")
    ]
    assert len(named) > 30
    assert not {(where, key) for where, key in named if key not in keys}


def test_every_command_that_is_named_exists():
    options = {verb: set() for verb in VERBS}
    for verb in VERBS:
        command = typer.main.get_command(_app(verb)).commands[verb]
        options[verb] = {
            option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]
        } | {"--help"}
    unknown, seen = [], 0
    for where, text in texts():
        for verb, rest in re.findall(r"`?expertmesh ([a-z]+)((?: [^\s`|]+)*)", text):
            if verb not in VERBS and f"`expertmesh {verb}" not in text:
                continue  # prose
            seen += 1
            wrong = [word for word in re.findall(r"(?<= )--[a-z-]+", rest) if word not in options.get(verb, ())]
            if verb not in VERBS or wrong:
                unknown.append((where, verb, wrong))
    assert seen > 40 and not unknown


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {(where, name) for where, text in texts() for name in re.findall(r"(?:`|^)make ([a-z-]+)(?=[`\s])", text)}
    named |= {("README.md", name) for name in re.findall(r"^make ([a-z-]+) ", (ROOT / "README.md").read_text(), re.M)}
    assert named and not {(where, name) for where, name in named if name not in targets}


def test_nothing_is_to_be_installed_from_where_it_is_not():
    """expertmesh is on no package index yet: it is installed from a clone, and its extras with it."""
    assert not [where for where, text in texts() if re.search(r"pip install ['\"]?expertmesh", text)]


def test_every_test_that_a_promise_names_exists():
    named = re.findall(r"`(tests/[^`:]+)(?:::(\w+))?`", (DOCS / "promises.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text()), (path, test)
