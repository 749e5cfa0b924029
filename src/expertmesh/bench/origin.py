"""Where a result comes from: hardware, versions, commit and command, in every file under benchmarks/results."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from expertmesh import backends
from expertmesh.bench.arms import LIBRARIES


def origin(command: list[str], commit: str | None, packages: tuple[str, ...] = ("triton", "transformers")) -> dict:
    """{"hardware", "gpus", "torch", a version for each package (None: not installed), and for each of `LIBRARIES` that
    is installed, "commit", "command"}.

    commit: None or "" asks git for that of the source tree this package runs from.
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
    """The result as JSON; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str | None:
    """The commit of the source tree this package runs from, None where it is no git checkout."""
    here = str(Path(__file__).parent)
    done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
