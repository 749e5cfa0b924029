"""`expertmesh adapter ADAPTER --for vllm`: a LoRA adapter in the layout that a server, or PEFT, reads."""

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.merge import ADAPTER_HELP, BASE_HELP, LAYOUT_HELP, OUTPUT_HELP, known_layout, naming_the_fix

FOR_HELP = "Who is to read it: `vllm`, `sglang` or `peft`."


def adapter(
    adapter: Annotated[Path, typer.Argument(help=ADAPTER_HELP)],
    reader: Annotated[str, typer.Option("--for", help=FOR_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP)],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP)] = None,
) -> None:
    """Write a LoRA adapter as vLLM, SGLang or PEFT reads it. The products stay the same, which is checked.

    Of the base model only config.json is read. Exit code 2 if the adapter cannot be read, or if the server would not
    apply all of it; then nothing is written.
    """
    from expertmesh.adapters.merge import base_model, base_of
    from expertmesh.adapters.serving import SERVERS
    from expertmesh.adapters.slots import rewrite
    from expertmesh.cli.check import quiet
    from expertmesh.train.errors import check_choice

    check_choice("--for", reader, (*SERVERS, "peft"))
    known_layout(layout)
    with naming_the_fix(), quiet():
        name = base_of(adapter, base)
        found = rewrite(adapter, base_model(name), output, reader, layout, name)
    typer.echo(f"The adapter, read as {found}, is in {output}, as {reader} reads it.")
