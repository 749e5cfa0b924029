"""`expertmesh train`: fine-tune a model from a YAML file, on all GPUs of a machine or as a rank of a larger run."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from expertmesh.train.config import Config

DRY_RUN = "Check everything that a run needs except the weights, print the resolved configuration, and stop."


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY.SUB=VALUE]...",
            help="A YAML file, and keys that override it, as in train.learning_rate=1e-4. "
            "Without a file, a tiny model is trained on the built-in data.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
) -> None:
    """Fine-tune a model from a YAML file; `expertmesh schema` lists the keys.

    Exit codes: 0 done, 1 failed, 2 wrong configuration; stopped after saving a checkpoint: 75 (SIGTERM, SIGHUP) and 130
    (Ctrl-C).
    """
    config = configuration(arguments or [])
    if dry_run:
        from expertmesh import backends
        from expertmesh.train.inputs import gather
        from expertmesh.train.planned import open_keys, resolve_auto

        unchecked: list[str] = []
        gather(config, unchecked)
        if open_keys(config) and backends.gpu() is None:
            unchecked.append("keys that are `auto`, as they are chosen for a GPU, and there is none here.")
        else:
            config = resolve_auto(config, num_ranks(config))
        for sentence in unchecked:
            typer.echo(f"Not checked: {sentence}", err=True)
        typer.echo(config.to_yaml(), nl=False)
        return

    from expertmesh.train.launch import is_rank, launch, leave_ranks

    if not is_rank() and (nproc := num_ranks(config)) > 1:
        from expertmesh.parallel.ranks import ALONE
        from expertmesh.train.inputs import check_settings
        from expertmesh.train.planned import auto_values, open_keys, resolve_auto
        from expertmesh.weights.files import folder_lock

        check_settings(config)
        with folder_lock(config.save.output_dir, ALONE):  # raise before `launch` writes its logs there
            pass
        values = auto_values(resolve_auto(config, nproc))  # here, so that not every rank plans
        chosen = [f"{key}={values[key]}" for key in open_keys(config)]
        command = [sys.executable, "-m", "expertmesh", "train", *(arguments or []), *chosen]
        raise typer.Exit(launch(command, nproc, Path(config.save.output_dir) / "logs"))

    from expertmesh.train.run import run

    result = run(config)
    if leave_ranks() != 0:
        raise typer.Exit(result.exit_code)
    if result.exit_code:
        again = " ".join(["expertmesh train", *(arguments or []), "save.resume_from_checkpoint=auto"])
        typer.echo(f"Stopped, with a checkpoint in {result.output_dir}. To resume: {again}", err=True)
        raise typer.Exit(result.exit_code)
    model = f"the model is in {result.final}, " if result.final else "the model was not saved, "
    typer.echo(f"Done: {model}metrics and plots are in {result.output_dir}.", err=True)


def configuration(words: Sequence[str]) -> "Config":
    """Return the configuration from command-line arguments: an optional YAML file and KEY=VALUE overrides."""
    from expertmesh.train.config import Config, ConfigError, load_config

    def is_override(word: str) -> bool:  # else it is a path, which may also contain `=`
        key, equals, _ = word.partition("=")
        if key.strip().partition(".")[0] in Config.model_fields:
            return bool(equals)
        return bool(equals) and re.fullmatch(r"[\w. -]+", key) is not None and not Path(word).is_file()

    files = [word for word in words if not is_override(word)]
    if len(files) > 1:
        raise ConfigError(f"Only one configuration file is expected, but there are {len(files)}: {', '.join(files)}.")
    return load_config(files[0] if files else None, [word for word in words if is_override(word)])


def num_ranks(config: "Config") -> int:
    """Return `parallel.nproc`; if it is unset, the number of visible GPUs, or 1 without a GPU."""
    import torch

    return config.parallel.nproc or max(1, torch.cuda.device_count())
