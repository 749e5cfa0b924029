"""`expertmesh doctor`: show what is installed, what is missing and its effect, and the fusions of each family."""

import platform
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

REQUIRED = {"python": ">=3.11", "torch": ">=2.11", "transformers": ">=5.23"}


def doctor() -> None:
    """Show what is installed, what is missing and its effect, and the fusions of each family on this Transformers.

    Exit code 1 if Python, PyTorch or Transformers is missing or has a version that expertmesh does not support, or if a
    family cannot be built.
    """
    from rich.console import Console
    from rich.table import Table

    from expertmesh import backends

    found = {"python": platform.python_version()} | {row.name: row.version for row in backends.table()}
    wrong = wrong_versions(found)
    table = Table(title="expertmesh on this machine", title_justify="left")
    for column in ("", "", "version", "used for", "without it"):
        table.add_column(column, overflow="fold")
    table.add_row(_state("python", found, wrong), "python", found["python"], "everything", "")
    for row in backends.table():
        lost = "" if row.version and row.name not in wrong else row.without_it
        table.add_row(_state(row.name, found, wrong), row.name, row.version, row.used_for, lost)
    console = Console()
    console.print(table)
    for sentence in wrong.values():
        console.print(sentence)
    if wrong:
        raise typer.Exit(1)
    version = found["transformers"]
    assert version is not None
    console.print(f"\n{whether_tested(version)}", soft_wrap=True)
    broken: list[str] = []
    with console.status("building a tiny model of each family"):
        fusions = _fusions(broken)
    console.print(fusions)
    if broken:
        console.print(f"{', '.join(broken)} cannot be built: install Transformers {backends.TESTED}.", soft_wrap=True)
        raise typer.Exit(1)


def wrong_versions(found: dict[str, str | None]) -> dict[str, str]:
    """Return a sentence for each package of REQUIRED that is missing or unsupported. found: {name: version}."""
    from packaging.specifiers import SpecifierSet

    wrong = {}
    for name, supported in REQUIRED.items():
        version = found.get(name)
        if version is None:
            wrong[name] = f"{name} is missing: install {name}{supported}."
        elif not SpecifierSet(supported).contains(version, prereleases=True):
            wrong[name] = f"{name} {version} is not supported: install {name}{supported}."
    return wrong


def whether_tested(version: str) -> str:
    """Return a sentence on whether expertmesh was tested with this version of Transformers."""
    from expertmesh import backends

    if backends.is_tested(version):
        return f"Transformers {version} is tested, as are all from {backends.TESTED}."
    return (
        f"[yellow]Transformers {version} is not tested[/], {backends.TESTED} are: check models with expertmesh check."
    )


def fusions_of(family: str) -> dict[str, list[str]]:
    """Return the names of the fusions of a tiny model of the family: on by "table" (its code is known), on by "probe"
    (its results were compared), and "off" although the model has modules for it.
    """
    from expertmesh.auto import AutoModelForCausalLM
    from expertmesh.bench.tiny import tiny_config
    from expertmesh.families.report import NOT_NEEDED

    names: dict[str, list[str]] = {"table": [], "probe": [], "off": []}
    for row in AutoModelForCausalLM.from_config(tiny_config(family)).fusion_report():
        if row.on or not row.reason.startswith(NOT_NEEDED):
            by = row.verified if row.on else "off"
            names[by].append(row.name)
    return names


def _fusions(broken: list[str]) -> "Table":
    """Return a table with the fusions of each family: the numbers on by table, on by probe and off, and most names.

    Append a family that cannot be built to `broken`.
    """
    import logging

    from rich.markup import escape
    from rich.table import Table

    from expertmesh.bench.tiny import FAMILIES
    from expertmesh.cli.check import quiet
    from expertmesh.train.errors import short_message

    table = Table(title="fusions of each family", title_justify="left")
    for column in ("family", "on by table", "on by probe", "off"):
        table.add_column(column, overflow="fold")
    logging.disable(logging.INFO)  # each model logs its own report
    try:
        with quiet():
            for family in FAMILIES:
                try:
                    by = fusions_of(family)
                except Exception as error:  # report it, and continue with the next family
                    table.add_row(f"[red]{family}", "cannot be built", "", escape(short_message(error)))
                    broken.append(family)
                    continue
                table.add_row(family, str(len(by["table"])), _listed(by["probe"]), _listed(by["off"]))
    finally:
        logging.disable(logging.NOTSET)
    return table


def _listed(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "0"


def _state(name: str, found: dict[str, str | None], wrong: dict[str, str]) -> str:
    return "[red]wrong" if name in wrong else "[green]on" if found.get(name) else "[yellow]off"
