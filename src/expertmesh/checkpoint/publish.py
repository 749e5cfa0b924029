"""Publish checkpoints atomically, and verify all of their files before they are loaded.

A checkpoint is written into `.checkpoint-<step>.incomplete`, which no reader takes for a checkpoint. When all files are
on the disk (fsync), a manifest of SHA-256 sums is added, and one rename makes it `checkpoint-<step>`. A process killed
before the rename leaves a hidden directory, which the next save removes. All ranks must see the same file system.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from expertmesh.weights.files import DamagedError, publish, read_sums, remove, sha256_sums, staging_folder, sync

MANIFEST = "checkpoint.sha256"  # `sha256sum -c` reads it
log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(incomplete|deleted)")


@contextmanager
def publishing(output_dir: str | Path, step: int, group: Any = None) -> Iterator[Path]:
    """Context manager that yields an empty directory and renames it to `output_dir/checkpoint-<step>` when it ends.

    All ranks of `group` (None: all) must enter, and write their own files. After an error nothing is published. It
    removes what killed saves and deletions left. Raises FileExistsError if the checkpoint exists: it is never replaced.
    """
    output_dir = Path(output_dir).expanduser()
    target, staging = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.incomplete"

    def begin() -> None:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists: resume from it, save to another folder, or move it away.")
        for path in output_dir.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                log.warning("%s is removed: a save or a deletion did not finish.", path)
                remove(path)

    with staging_folder(staging, begin, partial(publish, staging, target, MANIFEST), group):
        yield staging


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of all checkpoints in `output_dir`, oldest first, also those without a manifest."""
    folder = Path(output_dir).expanduser()
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(name[1]), path) for path in paths if (name := _CHECKPOINT.fullmatch(path.name)))


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint has a manifest, which is written last."""
    return (checkpoint / MANIFEST).is_file()


def verify(checkpoint: str | Path) -> None:
    """Compare every file with its SHA-256 in the manifest. All ranks must call it, and share the work.

    Raises DamagedError on every rank with the names of files that are missing, changed or not in the manifest, and of
    links and other special files, which are not followed. Raises FileNotFoundError if there is no manifest.
    """
    checkpoint = Path(checkpoint)
    if not is_complete(checkpoint):
        raise FileNotFoundError(f"{checkpoint} has no {MANIFEST}: its save did not finish. Take another one.")
    sums = read_sums(checkpoint / MANIFEST)
    modes = {path.relative_to(checkpoint).as_posix(): path.lstat().st_mode for path in checkpoint.rglob("*")}
    files = {name for name, mode in modes.items() if stat.S_ISREG(mode)}
    others = {name for name, mode in modes.items() if not stat.S_ISDIR(mode)} - files
    actual = sha256_sums(checkpoint, files & sums.keys())
    problems = [f"{name} is missing" for name in sorted(sums.keys() - files - others)]
    problems += [f"{name} has changed" for name in actual if actual[name] != sums[name]]
    problems += [f"{name} is not in the manifest" for name in sorted(files - sums.keys() - {MANIFEST})]
    problems += [f"{name} is a link, a pipe or a device" for name in sorted(others)]
    if problems:
        raise DamagedError(
            f"The checkpoint {checkpoint} is not what was saved: {'; '.join(problems)}. Restore it from a copy, or "
            f"move it away and resume from the one before."
        )


def newest_complete(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None. Warn about incomplete ones that are newer."""
    for _, path in reversed(checkpoints(output_dir)):
        if is_complete(path):
            return path
        log.warning("%s is skipped: without %s it is incomplete, or something else wrote it.", path, MANIFEST)
    return None


def prune(output_dir: str | Path, keep: int, protect: Sequence[str | Path] = ()) -> None:
    """Delete all complete checkpoints except `keep`: the newest, those in `protect`, then the next newest. Call it on
    one rank. Incomplete ones stay. Raises ValueError for `keep` below 1, as the newest is never deleted."""
    if keep < 1:
        raise ValueError(f"keep is {keep}, and at least 1 checkpoint must be kept.")
    complete = [path for _, path in reversed(checkpoints(output_dir)) if is_complete(path)]
    protected = {Path(path).resolve() for path in (*complete[:1], *protect)}
    others = [path for path in complete if path.resolve() not in protected]
    for path in others[max(0, keep - len(complete) + len(others)) :]:
        doomed = path.with_name(f".{path.name}.deleted")  # so that a partial deletion leaves no checkpoint
        os.rename(path, doomed)
        sync(path.parent)
        remove(doomed)
