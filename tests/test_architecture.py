"""The house rules that can be checked: rooms import only from below, files stay small, what is public is documented."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import expertmesh

PACKAGE = Path(next(iter(expertmesh.__path__)))
FILES = sorted(PACKAGE.rglob("*.py"))

# From the roof to the cellar: a room imports only from rooms to the right of it.
ROOMS = """
__main__ cli bench train plan adapters data checkpoint nemo auto fuse weights families layers memory parallel moe
kernels twins records timeouts backends
""".split()
OUTSIDE_CORE = {"__main__", "cli", "train", "bench", "data", "plan", "adapters"}


def room(path: Path) -> str | None:
    """The room of a file; None for the package's own __init__, which hands out names lazily and may know every room."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours in the file, also inside functions and under TYPE_CHECKING."""
    package = ("expertmesh", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])]
            start = ".".join(base) if node.level else node.module or ""
            # `from expertmesh import data` names the room in the imported name, not in the module
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _is_import_module(node):
            names = [node.args[0].value]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "expertmesh" and len(parts) > 1 and parts[1] in ROOMS:
                yield node.lineno, parts[1]


def _is_import_module(node: ast.Call) -> bool:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_file_stands_in_a_known_room():
    assert {room(path) for path in FILES} - {None} <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path):
    here = room(path)
    if here is None:
        return
    above = [f"line {line}: {other}" for line, other in imported_rooms(path) if ROOMS.index(other) < ROOMS.index(here)]
    assert not above, f"{path.relative_to(PACKAGE)} is in {here} and imports from above it: {'; '.join(above)}"


def test_the_page_of_rooms_lists_them_in_this_order():
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    listed = [name.removesuffix(".py") for name in re.findall(r"^\| `(\w+(?:\.py)?)` \|", page, re.MULTILINE)]
    assert listed == [name for name in ROOMS if name != "nemo"]


def test_every_way_to_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "kernels" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "import expertmesh.cli.main\n"
        "from expertmesh import train\n"
        "from expertmesh.plan.memory import fits\n"
        "from ..data import sources\n"
        "def f():\n    from expertmesh.auto import AutoModelForCausalLM\n"
        "def g():\n    importlib.import_module('expertmesh.bench')\n"
        "from . import y\n"
        "import torch\n"
    )
    assert [other for _, other in sorted(imported_rooms(file))] == "cli train plan data auto bench kernels".split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_read_in_one_sitting(path):
    assert lines(path) <= 400


@pytest.mark.parametrize(("outside", "limit"), [(OUTSIDE_CORE, 12_581), (OUTSIDE_CORE - {"train"}, 15_983)])
def test_the_core_stays_under_its_limit_without_train_and_with_it(outside, limit):
    """Two fifths are kernels. Released gradients, states, Muon, adapters, 4 bits, recomputing, offloading: 2,140."""
    assert sum(lines(path) for path in FILES if room(path) not in outside) <= limit


def test_benchmarks_stay_under_their_limit():
    assert sum(lines(path) for path in (PACKAGE.parents[1] / "benchmarks").glob("*.py")) <= 2_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a file begins by saying what it is"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    # a registration below `if TRITON:` is as public as one above it
    public += [
        node
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    missing = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
    assert not missing, f"{path.relative_to(PACKAGE)}: no docstring on {', '.join(missing)}"


def test_texts_name_only_what_users_can_import():
    named: dict[str, Path] = {}
    for path in FILES:
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        for text in filter(lambda value: isinstance(value, str), texts):
            named |= dict.fromkeys(re.findall(r"\bexpertmesh(?:\.[a-zA-Z_]\w*)+", text), path)
    assert "expertmesh.SFTTrainer" in named
    for name, path in named.items():
        if name.endswith(".json"):
            continue
        found = expertmesh
        for part in name.split(".")[1:]:
            if isinstance(found, ModuleType) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            assert hasattr(found, part), f"{path} speaks of {name}"
            found = getattr(found, part)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_left_unfinished_or_swallowed(path):
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert not re.search(r"except[^\n]*:\s*\n?\s*pass\b", text), "an error that is swallowed hides a bug"
    assert "raise NotImplementedError" not in text
