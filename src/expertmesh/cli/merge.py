"""`expertmesh merge ADAPTER`: merge a LoRA adapter into the weights of its base model, as an ordinary export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ADAPTER_HELP = "A folder with adapter_config.json and adapter_model.safetensors."
OUTPUT_HELP = "Folder to write; it is written completely or not at all."
BASE_HELP = "The base model, a folder or a Hub id; default: the one that the adapter names."
LAYOUT_HELP = "Layout of a lora_B that holds all experts, if the adapter does not record it: `rank-major` (PEFT's) or "
LAYOUT_HELP += "`expert-major` (Unsloth's until September 2026)."


def merge(
    adapter: Annotated[Path, typer.Argument(help=ADAPTER_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP)],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP)] = None,
    mxfp4: Annotated[bool, typer.Option("--mxfp4", help="Repack the experts of an MXFP4 base in MXFP4.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model, in the base's dtypes, keys and files.

    The logits of base and adapter under PEFT are compared with those of the merged weights, in float32. If they differ,
    nothing is written and the exit code is 1. It is 2 if adapter or base cannot be read, or do not match.
    """
    from expertmesh.adapters import merge as merging
    from expertmesh.cli.check import quiet

    known_layout(layout)
    with naming_the_fix(), quiet():
        proof = merging.merge(adapter, base, output, layout, mxfp4)
    if proof.dequantized:
        how = "its experts are packed again" if mxfp4 else "the merged model is in bfloat16, not packed again"
        typer.echo(f"The base is in {proof.dequantized.upper()}: {how}.")
    typer.echo(
        f"The adapter, read as {proof.layout}, changes {proof.changed[0]} weights, {proof.changed[1]} of them routed "
        f"experts', and moves the logits by {proof.effect:.1e} of the largest. Merged and base + adapter ({proof.by}) "
        f"differ by {proof.error:.1e} in float32; rounding the weights moves them by "
        f"{proof.rounding:.1e}. All {proof.parameters} weights were read back. The model is in {output}."
    )


@contextmanager
def naming_the_fix() -> Iterator[None]:
    """Context manager that turns errors of an adapter or a base model into ConfigError, which gives exit code 2."""
    from expertmesh.adapters.files import AdapterError
    from expertmesh.train.errors import ConfigError
    from expertmesh.weights.files import DamagedError

    try:
        yield
    except (AdapterError, DamagedError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def known_layout(layout: str | None) -> None:
    """Raise ConfigError for an unknown layout."""
    from expertmesh.adapters.layouts import EXPERT_MAJOR, RANK_MAJOR
    from expertmesh.train.errors import check_choice

    if layout is not None:
        check_choice("--layout", layout, (RANK_MAJOR, EXPERT_MAJOR))
