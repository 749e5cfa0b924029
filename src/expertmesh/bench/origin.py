"""The provenance in every file under benchmarks/results: hardware, versions, commit and command."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from expertmesh import backends
from expertmesh.bench.arms import LIBRARIES


def origin(command: list[str], commit: str | None, packages: tuple[str, ...] = ("triton", "transformers")) -> dict:
    """Return {"hardware", "gpus", "torch", "commit", "command"}, the version of each package (None if it is not
    installed), and that of each installed library of `LIBRARIES`.

    If `commit` is None or "", it is the git commit of the source tree from which this package runs.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else "cpu",
        "gpus": int(on_gpu),
        "torch": torch.__version__,
        **{name: backends.version_of(name) for name in packages},
        **{name: version for name in LIBRARIES if (version := backends.version_of(name))},
        "commit": commit or _commit(),
        "command": shlex.join(command),
    }


def write(result: dict[str, Any], path: str | None) -> None:
    """Write the result as JSON, if a path is given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str | None:
    """Return the commit of the source tree from which this package runs, or None if it is not a git checkout."""
    folder = str(Path(__file__).parent)
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
