"""The command line, `expertmesh VERB ...`. Each verb has a file, which is imported only when the verb is called.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration; after saving a checkpoint, 75 for SIGTERM, 130 for Ctrl-C.
An error that a user can fix is printed as one paragraph; EXPERTMESH_DEBUG=1 adds the traceback.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

VERBS = {
    "train": "Fine-tune a model from a YAML file.",
    "plan": "Predict memory and speed of a run without loading the model.",
    "launch": "Write the Slurm or SkyPilot file that trains on several machines.",
    "check": "Check that a model computes and saves the same as under stock Transformers.",
    "merge": "Merge a LoRA adapter into its base model, and check the logits.",
    "adapter": "Convert a LoRA adapter to the format of vLLM, SGLang or PEFT.",
    "bench": "Time stock Transformers and expertmesh on the same work, in one job.",
    "demo": "Train, export and verify a small model on this machine.",
    "doctor": "Show what is installed, what is missing and its effect, and the fusions of each family.",
    "schema": "Print the JSON Schema of the configuration.",
}


def main() -> None:
    """The `expertmesh` command."""
    code = run(sys.argv[1:])
    if code and os.environ.get("RANK"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skip the destructors: a failed rank must not wait for the others in its process group's
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line, given without the program's name, and return its exit code."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        _app(verb)(list(arguments), prog_name="expertmesh")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        return _report(error)
    return 0


def _app(verb: str | None) -> typer.Typer:
    """Return the app with all verbs. Import only `verb`, so that `--help` does not wait for PyTorch."""
    app = typer.Typer(
        help="Fast Mixture-of-Experts fine-tuning that stays plain Transformers.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, sentence in VERBS.items():
        is_called = name == verb
        app.command(name, help=None if is_called else sentence)(_load(name) if is_called else _not_called)
    return app


def _load(verb: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"expertmesh.cli.{verb}"), verb)


def _not_called() -> None:
    """Placeholder for a verb that was not called."""


def _report(error: Exception) -> int:
    """Print an error for the user and return the exit code."""
    from expertmesh.train.errors import ConfigError, explain
    from expertmesh.train.launch import record_error

    paragraph = explain(error)
    lines = [] if paragraph is None else [f"expertmesh: error: {paragraph}\n"]
    if paragraph is None or os.environ.get("EXPERTMESH_DEBUG"):
        lines = traceback.format_exception(error) + lines
    if not record_error("".join(lines)):
        print("".join(lines), end="", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
