"""`expertmesh check MODEL`: check that expertmesh computes and saves the same as stock Transformers.

With `--serve`, MODEL is an adapter, and the command checks whether a server applies all of it.
"""

import contextlib
import difflib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.cli.merge import LAYOUT_HELP, known_layout, naming_the_fix

if TYPE_CHECKING:
    from rich.table import Table

    from expertmesh.bench.rows import Row

SERVE_HELP = "MODEL is a LoRA adapter: check whether `vllm` or `sglang` has a slot for each of its tensors."
BASE_HELP = "With --serve: the adapter's base model, a folder or a Hub id; default: the one that the adapter names."
MODEL_HELP = "A checkpoint folder, a Hub id, a family (`qwen3_moe`, as a tiny model), or `all` families."
RANKS_HELP = "Compare FSDP2 and expert parallelism on this number of processes with stock on one process."
DEVICE_HELP = "`cpu`: float32, equal within 1e-5. `cuda`: bfloat16, at most 1.5 times stock's own error."


def check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ranks: Annotated[int, typer.Option(min=1, help=RANKS_HELP)] = 1,
    serve: Annotated[str | None, typer.Option(help=SERVE_HELP)] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP)] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every comparison, not one line per case.")
    ] = False,
) -> None:
    """Compare loss, logits, gradients, generation and export with stock Transformers. Exit code 1 if any differs.

    First, the files of a local checkpoint are compared with its checksums, if it has any.
    """
    if serve is not None or base is not None or layout is not None:
        raise typer.Exit(_serves(Path(model), serve, base, layout))

    import transformers
    from rich.console import Console
    from rich.markup import escape

    from expertmesh import backends
    from expertmesh.bench.layouts import check_layouts
    from expertmesh.bench.parity import check_checkpoint, checkpoint_of
    from expertmesh.bench.tiny import FAMILIES
    from expertmesh.train.errors import ConfigError, short_message

    _check_options(model, device, ranks)
    console = Console()
    failed = 0
    for name in FAMILIES if model == "all" else [model]:
        try:
            _verify(name)
            with console.status(f"{name}: comparing with stock Transformers"), quiet(), checkpoint_of(name) as path:
                rows = check_layouts(path, ranks) if ranks > 1 else list(check_checkpoint(path, device))
        except OSError as error:
            raise ConfigError(f"{name!r} cannot be loaded by Transformers: {' '.join(str(error).split())}") from error
        except Exception as error:  # an error is a result, too: `all` continues with the next family
            if os.environ.get("EXPERTMESH_DEBUG") or type(error).__module__.startswith("expertmesh."):
                raise
            console.print(f"{name}: DIFFERS, or cannot be compared: {escape(short_message(error))}.", soft_wrap=True)
            if not backends.is_tested(transformers.__version__):
                console.print(f"Transformers {transformers.__version__} is not tested: install {backends.TESTED}.")
            console.print("EXPERTMESH_DEBUG=1 shows where this comes from.\n")
            failed += 1
            continue
        console.print(_table(name, rows, verbose))
        differing = [row for row in rows if not row.ok]
        for row in differing:
            if row.where:
                console.print(f"{row.case}, {row.quantity}: worst in {escape(row.where)}", soft_wrap=True)
        console.print(f"{name}: {len(rows)} comparisons, {len(differing)} differ\n")
        failed += len(differing)
    raise typer.Exit(1 if failed else 0)


def _serves(adapter: Path, server: str | None, base: str | None, layout: str | None) -> int:
    """Print the modules of an adapter that a server would not apply. Return the exit code, 1 if there are any."""
    from expertmesh.adapters.merge import base_model, base_of
    from expertmesh.adapters.serving import SERVERS
    from expertmesh.adapters.slots import lost
    from expertmesh.train.errors import ConfigError, check_choice

    if server is None:
        raise ConfigError(
            "--base and --layout are options for adapters: name the server to check for (--serve vllm|sglang)."
        )
    check_choice("--serve", server, SERVERS)
    known_layout(layout)
    with naming_the_fix(), quiet():
        missing, count, source = lost(adapter, base_model(base_of(adapter, base)), server, layout)
    for tensor in missing:
        typer.echo(f"{tensor.path} {tensor.why}.")
    applied = count - len({tensor.path for tensor in missing})
    typer.echo(f"{server}, by its {source}: {applied} of {count} adapted modules have a slot, {len(missing)} do not.")
    if missing:
        typer.echo(
            f"`expertmesh adapter {adapter} --for {server}` converts it to the format of {server}, if that is possible."
        )
    return 1 if missing else 0


def _check_options(model: str, device: str, ranks: int) -> None:
    import torch

    from expertmesh.bench.tiny import FAMILIES
    from expertmesh.train.errors import ConfigError

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is cpu or cuda, not {device!r}.")
    if device == "cuda" and ranks > 1:
        raise ConfigError("--ranks compares in float32 on the CPU: leave out --device.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device: leave out --device, and the check runs on the CPU.")
    if model != "all" and model not in FAMILIES and "/" not in model and not os.path.isdir(model):
        near = difflib.get_close_matches(model, ["all", *FAMILIES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{model!r} is neither a folder, nor a Hub id (owner/name), nor a family.{hint} "
            f"Families: {', '.join(FAMILIES)}."
        )


def _verify(name: str) -> None:
    """Raise DamagedError if files of a checkpoint or an export do not match their checksums."""
    from expertmesh.checkpoint.publish import is_complete, verify
    from expertmesh.weights.files import verify_sums

    if is_complete(Path(name)):
        verify(name)
    verify_sums(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences Transformers' warnings and progress bars, which both sides would print."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _table(name: str, rows: "list[Row]", verbose: bool) -> "Table":
    """Return a table of all rows, or for each case of those that differ; if none does, of the nearest to its limit."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{name} against stock Transformers", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("case", "quantity"):
        table.add_column(column, no_wrap=True)
    for column in ("error", "allowed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for case in dict.fromkeys(row.case for row in rows):
        shown = of_case = [row for row in rows if row.case == case]
        if not verbose:
            nearest = max(of_case, key=lambda row: row.error / (row.limit or 1.0))
            shown = [row for row in of_case if not row.ok] or [nearest]
        for row in shown:
            verdict = "[green]equal[/]" if row.ok else "[bold red]DIFFERS[/]"
            table.add_row(row.case, row.quantity, f"{row.error:.1e}", f"{row.limit:.1e}", verdict)
    return table
