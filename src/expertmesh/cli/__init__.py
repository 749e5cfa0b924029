"""The command line: `expertmesh VERB ...`, one small file per verb, imported only when that verb is called.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped by SIGTERM and 130 by Ctrl-C, checkpoint saved.
An error that a user can fix is one paragraph without a traceback; EXPERTMESH_DEBUG=1 shows the traceback as well.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

VERBS = {
    "train": "Fine-tune a model as a YAML file says.",
    "plan": "Say what a run needs and how fast it will be, before it loads anything.",
    "launch": "Write the Slurm or SkyPilot file that trains on several machines.",
    "check": "Prove that a model computes and saves what it does under stock Transformers.",
    "merge": "Merge a LoRA adapter into its base model, and prove it on logits.",
    "adapter": "Write a LoRA adapter as vLLM, SGLang or PEFT reads it.",
    "bench": "Time stock Transformers and expertmesh on the same work, in one job.",
    "demo": "Train, export and verify a small model on this machine.",
    "doctor": "Show what is installed, what is lost without the rest, and the fusions of each family.",
    "schema": "Print the JSON Schema of the configuration.",
}


def main() -> None:
    """The `expertmesh` command."""
    code = run(sys.argv[1:])
    if code and os.environ.get("RANK"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a rank that fails must not wait for others in the destructors of its process group
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line, given without the program's name, and returns its exit code."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        _app(verb)(list(arguments), prog_name="expertmesh")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        return _report(error)
    return 0


def _app(verb: str | None) -> typer.Typer:
    """Every verb with its help; only `verb` itself is imported, so that `--help` does not wait for PyTorch."""
    app = typer.Typer(
        help="Fast Mixture-of-Experts fine-tuning that stays plain Transformers.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, sentence in VERBS.items():
        called = name == verb
        app.command(name, help=None if called else sentence)(_load(name) if called else _not_called)
    return app


def _load(verb: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"expertmesh.cli.{verb}"), verb)


def _not_called() -> None:
    """Placeholder for a verb that was not called."""


def _report(error: Exception) -> int:
    """Prints an error as a user should see it and returns the exit code."""
    from expertmesh.train.errors import ConfigError, explain
    from expertmesh.train.launch import record_error

    paragraph = explain(error)
    said = [] if paragraph is None else [f"expertmesh: error: {paragraph}\n"]
    if paragraph is None or os.environ.get("EXPERTMESH_DEBUG"):
        said = traceback.format_exception(error) + said
    if not record_error("".join(said)):
        print("".join(said), end="", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
