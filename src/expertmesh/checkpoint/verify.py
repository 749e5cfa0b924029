"""Is every byte of a checkpoint the one that was saved? Asked before anything is loaded from it."""

import json
import stat
from pathlib import Path
from typing import Any

from expertmesh.checkpoint.publish import MANIFEST
from expertmesh.weights.files import digests


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded. `problems` names each file and what is wrong with it."""

    def __init__(self, message: str, problems: list[str]):
        super().__init__(message)
        self.problems = problems


def verify(checkpoint: str | Path) -> None:
    """Compare every file's size and SHA-256 with the manifest. Every rank takes a share of the files.

    Raises CheckpointError on every rank, naming each file that is missing, truncated, changed or not in the manifest,
    and what is no file: nothing outside the folder is looked at. FileNotFoundError if there is no manifest.
    """
    checkpoint = Path(checkpoint)
    entries = _manifest(checkpoint)
    modes = {path.relative_to(checkpoint).as_posix(): path.lstat().st_mode for path in checkpoint.rglob("*")}
    files = {name for name, mode in modes.items() if stat.S_ISREG(mode)}
    others = {name for name, mode in modes.items() if not stat.S_ISDIR(mode)} - files
    found = digests(checkpoint, files & entries.keys())
    looked_at = (_problem(name, entries[name], found.get(name)) for name in sorted(entries.keys() - others))
    problems = [problem for problem in looked_at if problem]
    problems += [f"{name} is not in the manifest" for name in sorted(files - entries.keys() - {MANIFEST})]
    problems += [f"{name} is a link, a pipe or a device" for name in sorted(others)]
    if problems:
        raise CheckpointError(
            f"The checkpoint {checkpoint} is not what was saved: {'; '.join(problems)}. Restore it from a copy, or "
            f"move it away and resume from the one before.",
            problems,
        )


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {MANIFEST}: its save did not finish, or something else wrote it. Take another one."
        )
    try:
        entries = json.loads(path.read_bytes())
        for name, entry in entries.items():
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"{name} has no size in bytes, or no SHA-256")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The manifest of {checkpoint} cannot be read ({error}). Restore {MANIFEST} from a copy, or move the "
            f"checkpoint away and resume from the one before.",
            [f"{MANIFEST} cannot be read"],
        ) from None


def _problem(name: str, wanted: dict[str, Any], found: dict[str, Any] | None) -> str | None:
    if found is None:
        return f"{name} is missing"
    if found["size"] != wanted["size"]:
        return f"{name} has {found['size']} bytes instead of {wanted['size']}"
    return None if found == wanted else f"{name} has changed (its SHA-256 differs)"
