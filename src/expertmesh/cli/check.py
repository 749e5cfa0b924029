"""`expertmesh check MODEL`: prove that a model under expertmesh is the model under stock Transformers."""

import contextlib
import difflib
import os
import warnings
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as hf_logging

from expertmesh.bench.rows import Row


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a Hub id, a family (`qwen3_moe`: a tiny model is made), or `all` families."
        ),
    ],
    device: Annotated[
        str, typer.Option(help="`cpu`: float32, equal within 1e-5. `cuda`: bfloat16, at most 1.5x stock's error.")
    ] = "cpu",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every comparison, not one line per case.")
    ] = False,
) -> None:
    """Compare loss, logits, gradients, generation and export with stock Transformers. Exit code 1 if any differs."""
    from expertmesh.bench.parity import check_model
    from expertmesh.bench.tiny import FAMILIES

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is cpu or cuda, not {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device: leave out --device, and the check runs on the CPU.")
    if model != "all" and model not in FAMILIES and "/" not in model and not os.path.isdir(model):
        near = difflib.get_close_matches(model, ["all", *FAMILIES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise typer.BadParameter(
            f"{model!r} is neither a folder, nor a Hub id (owner/name), nor a family.{hint} "
            f"Families: {', '.join(FAMILIES)}."
        )
    console = Console()
    failed = 0
    for name in FAMILIES if model == "all" else [model]:
        try:
            with console.status(f"{name}: comparing with stock Transformers"), _quiet():
                rows = list(check_model(name, device))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        console.print(_table(name, rows if verbose else _worst_per_case(rows)))
        differ = sum(not row.ok for row in rows)
        console.print(f"{name}: {len(rows)} comparisons, {differ} differ\n")
        failed += differ
    raise typer.Exit(1 if failed else 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' warnings and progress bars: both sides of each comparison would print them."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _worst_per_case(rows: list[Row]) -> list[Row]:
    """Per case the rows that differ, or if none does the one nearest to its limit."""
    kept = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        kept += [row for row in of_case if not row.ok] or [max(of_case, key=lambda row: row.error / (row.limit or 1.0))]
    return kept


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(title=f"{name}: expertmesh against stock Transformers")
    table.add_column("case")
    table.add_column("quantity")
    table.add_column("difference", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    table.add_column("where", overflow="fold")
    for row in rows:
        verdict = "[green]equal[/]" if row.ok else "[bold red]DIFFERS[/]"
        table.add_row(
            row.case,
            row.quantity,
            f"{row.error:.1e}",
            f"{row.limit:.1e}",
            verdict,
            escape(row.where) if row.error else "",
        )
    return table
