"""`expertmesh adapter ADAPTER --for vllm`: convert a LoRA adapter to the layout that a server or PEFT reads."""

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.merge import ADAPTER_HELP, BASE_HELP, LAYOUT_HELP, OUTPUT_HELP, known_layout, naming_the_fix

FOR_HELP = "The program that will read it: `vllm`, `sglang` or `peft`."


def adapter(
    adapter: Annotated[Path, typer.Argument(help=ADAPTER_HELP)],
    reader: Annotated[str, typer.Option("--for", help=FOR_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP)],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP)] = None,
) -> None:
    """Convert a LoRA adapter to the format of vLLM, SGLang or PEFT, and check that all products B A stay the same.

    Only the base model's config.json is read. If the adapter cannot be read, or the server would not apply all of it,
    nothing is written and the exit code is 2.
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
        source_layout = rewrite(adapter, base_model(name), output, reader, layout, name)
    typer.echo(f"The adapter, read as {source_layout}, is in {output}, in the format of {reader}.")
