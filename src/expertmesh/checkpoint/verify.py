"""Is every byte of a checkpoint the one that was saved? Asked before anything is loaded from it."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from expertmesh.checkpoint.publish import MANIFEST
from expertmesh.parallel import ranks
from expertmesh.weights.files import sha256


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
    names = sorted(entries.keys() - others)[ranks.rank() :: ranks.world_size()]
    with ranks.together(), ThreadPoolExecutor() as pool:  # hashing releases the GIL
        found = list(pool.map(lambda name: _problem(checkpoint / name, name, entries[name], name in files), names))
    extra = [f"{name} is not in the manifest" for name in sorted(files - entries.keys() - {MANIFEST})]
    extra += [f"{name} is a link, a pipe or a device" for name in sorted(others)]
    shares = ranks.gathered([problem for problem in found if problem])
    problems = sorted(problem for share in shares for problem in share) + extra
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


def _problem(path: Path, name: str, entry: dict[str, Any], is_there: bool) -> str | None:
    if not is_there:
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes instead of {entry['size']}"
    return None if sha256(path) == entry["sha256"] else f"{name} has changed (its SHA-256 differs)"
