"""`expertmesh doctor`: what this machine has, and what is lost without the rest."""

import platform

import typer

REQUIRED = {"python": ">=3.11", "torch": ">=2.11", "transformers": ">=5.23,<5.25"}


def doctor() -> None:
    """Show what is installed, what is on or off, and what is lost without it.

    Exit code 1 if Python, PyTorch or Transformers is missing or has a version that expertmesh does not support.
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
    raise typer.Exit(1 if wrong else 0)


def wrong_versions(found: dict[str, str | None]) -> dict[str, str]:
    """One sentence for each of REQUIRED that `found` (name: version) lacks or has in an unsupported version."""
    from packaging.specifiers import SpecifierSet

    wrong = {}
    for name, supported in REQUIRED.items():
        version = found.get(name)
        if version is None:
            wrong[name] = f"{name} is missing: install {name}{supported}."
        elif not SpecifierSet(supported).contains(version, prereleases=True):
            wrong[name] = f"{name} {version} is not supported: install {name}{supported}."
    return wrong


def _state(name: str, found: dict[str, str | None], wrong: dict[str, str]) -> str:
    return "[red]wrong" if name in wrong else "[green]on" if found.get(name) else "[yellow]off"
