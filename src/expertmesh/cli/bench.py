"""`expertmesh bench`: time stock Transformers and expertmesh on the same work or in common trainers, in one job."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

WORK_HELP = "Models by name, with commas: qwen3-30b-a3b, nemotron-3-nano, gpt-oss-20b, deepseek-v3."
ARMS_HELP = (
    "Arms, with commas: stock, stock-compiled (each layer by torch.compile), stock-liger, expertmesh, "
    "stock-flash-attn-4, expertmesh-no-NAME (one fusion or library off), and with --loop expertmesh-trainer (with "
    "expertmesh's trainer) and, for adapters, expertmesh-4bit (experts in 4 bits). Default: the first four if they run "
    "here, with --loop all that apply."
)
LOOP_HELP = (
    "Time whole steps of common trainers, with commas: trainer, trainer-padded, lora, lora-experts (transformers."
    "Trainer), sft, sft-packed, dpo (TRL's). Under torchrun: trainer."
)
ABLATE_HELP = "Also time expertmesh without each of its fusions and libraries, one by one, to show its effect."
ROUTING_HELP = "How tokens choose experts, with commas: random-init, skewed (as after training), balanced."
LAYERS_HELP = "Number of the model's layers; default: as many as stock can train on one 141 GB GPU."
PACKED_HELP = "Pack 14 documents of unequal length into each sequence; models get their boundaries."
STEP_HELP = "Time whole steps: clipping and fused AdamW after the backward; tokens/s are then those of the step."
PROFILE_HELP = "Also show device time by component of the layer and its lower bound, at the last batch size."
OUT_HELP = "Write the result to this JSON file, and pictures next to it (with matplotlib)."
COMMIT_HELP = "The commit to note in the result if the source is not a git checkout."


def bench(
    work: Annotated[str, typer.Option(help=WORK_HELP)] = "qwen3-30b-a3b",
    arms: Annotated[str | None, typer.Option(help=ARMS_HELP)] = None,
    loop: Annotated[str | None, typer.Option(help=LOOP_HELP)] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help=ABLATE_HELP)] = False,
    batch: Annotated[str, typer.Option(help="Sequences per step, with commas.")] = "1,4",
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 4096,
    layers: Annotated[int | None, typer.Option(min=1, help=LAYERS_HELP)] = None,
    routing: Annotated[str, typer.Option(help=ROUTING_HELP)] = "random-init",
    packed: Annotated[bool, typer.Option("--packed", help=PACKED_HELP)] = False,
    step: Annotated[bool, typer.Option("--step", help=STEP_HELP)] = False,
    proof: Annotated[bool, typer.Option(help="Compare every arm's gradients with float32 before timing.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help=PROFILE_HELP)] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use models of a few thousand parameters, to try the bench.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="`cuda` or `cpu`; default: the GPU if there is one.")] = None,
    warmup: Annotated[int | None, typer.Option(min=1, help="Steps before the timed ones: 3, with --loop 6.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed steps; their median counts: 7, with --loop 24.")
    ] = None,
    out: Annotated[str | None, typer.Option(help=OUT_HELP)] = None,
    commit: Annotated[str | None, typer.Option(help=COMMIT_HELP)] = None,
) -> None:
    """Train the same model, weights, tokens and routing under stock Transformers and under expertmesh, in turn.

    First, every arm's loss and gradients are compared with stock in float32. With --loop, the losses of the steps are
    shown instead. Exit code 1 if an arm failed.
    """
    from rich.console import Console

    from expertmesh.backends import version_of
    from expertmesh.bench.run import BenchOptions, run
    from expertmesh.train.errors import install

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=160)  # in a log file, truncate no column
    result = run(
        BenchOptions(
            works=_names(work),
            arms=None if arms is None else _names(arms),
            loops=() if loop is None else _names(loop),
            batches=_sizes(batch),
            seq=seq,
            layers=layers,
            routings=_names(routing),
            tiny=tiny,
            device=device,
            full=step,
            packed=packed,
            ablate=ablate,
            proof=proof,
            profile=profile,
            warmup=warmup,
            repeats=repeats,
            out=out,
            commit=commit,
        ),
        say=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    if int(os.environ.get("RANK", 0)):  # the first rank prints
        raise typer.Exit(1 if result["failed"] else 0)
    for table in (_loop_tables if loop else _tables)(result["rows"]):
        console.print(table)
    if out and not loop and version_of("matplotlib") is None:
        console.print(f"no pictures: {install('matplotlib')} adds matplotlib", markup=False)
    elif out and not loop:
        from expertmesh.bench.pictures import draw

        for path in draw(result, out):
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if result["failed"] else 0)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _sizes(text: str) -> tuple[int, ...]:
    from expertmesh.train.errors import ConfigError

    names = _names(text)
    if not all(name.isdigit() and int(name) > 0 for name in names):
        raise ConfigError(f"--batch takes numbers of sequences with commas, such as 1,4, not {text!r}.")
    return tuple(map(int, names))


def _loop_tables(rows: list[dict[str, Any]]) -> "list[Table]":
    """Return one table per work, loop and batch. The last column is the speed-up over the first arm."""
    from rich import box
    from rich.table import Table

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["work"], row["layers"], row["loop"], row["batch"], row["seq"]), []).append(row)
    tables = []
    for (work, layers, loop, batch, seq), group in groups.items():
        title = f"{loop}: {work}, {layers} layers, {batch} x {seq} tokens"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("arm", no_wrap=True)
        for name in ("step ms", "shortest", "longest", "tokens/s", "GiB", "losses", f"x {group[0]['arm']}"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            times = row["step_ms"], min(row["steps_ms"]), max(row["steps_ms"])
            cells = [*(f"{ms:,}" for ms in times), f"{row['tokens_per_second']:,}"]
            cells.append("" if row["peak_gib"] is None else f"{row['peak_gib']:,}")
            cells.append(" ".join(f"{loss:.3f}" for loss in row["losses"]))
            table.add_row(row["arm"], *cells, f"{group[0]['step_ms'] / row['step_ms']:.2f}")
        tables.append(table)
    return tables


def _tables(rows: list[dict[str, Any]]) -> "list[Table]":
    """Return one table per work, routing and batch. The last columns are the speed-up over the first arm and `worth`:
    the time without a fusion over the time of expertmesh.
    """
    from rich import box
    from rich.table import Table

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["work"], row["layers"], row["routing"], row["batch"], row["seq"]), []).append(row)
    tables = []
    for (work, layers, routing, batch, seq), group in groups.items():
        packed = f" in {batch * group[0]['documents']} documents" if group[0]["documents"] > 1 else ""
        title = f"{work}, {layers} layers, {batch} x {seq} tokens{packed}, {routing} routing"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        columns = {
            "forward": "forward_ms",
            "backward": "backward_ms",
            "clip": "clip_ms",
            "optimizer": "optimizer_ms",
            "step ms": "step_ms",
            "tokens/s": "tokens_per_second_per_gpu",
            "TFLOP/s": "tflops_per_gpu",
            "% GEMM": "percent_of_gemm",
            "GiB": "peak_gib",
            "syncs": "host_syncs",
            "launches": "launches",
        }
        columns = {name: key for name, key in columns.items() if any(row[key] is not None for row in group)}
        table.add_column("arm", no_wrap=True)
        whole = next((row["step_ms"] for row in group if row["arm"] == "expertmesh"), None)
        ablated = whole is not None and any(row["arm"].startswith("expertmesh-no-") for row in group)
        for name in (*columns, f"x {group[0]['arm']}", *["worth"] * ablated):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            cells = [f"{row[key]:,}" if row[key] is not None else "" for key in columns.values()]
            cells.append(f"{group[0]['step_ms'] / row['step_ms']:.2f}")
            if ablated and row["arm"].startswith("expertmesh-no-"):
                cells.append(f"{row['step_ms'] / whole:.3f}")
            table.add_row(row["arm"], *cells)
        tables.append(table)
    return tables
