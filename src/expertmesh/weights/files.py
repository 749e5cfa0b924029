"""Files that appear whole or not at all, written by one run at a time.

They are written into a hidden folder. When every byte and their sums are on the disk, one rename makes it a checkpoint
(checkpoint/publish.py). An export goes where another may be, so its files are then moved one by one: what a reader
looks for first, the index or the only weights file, goes before the rest is touched and comes last. So a kill leaves
the old export, the new one, or a folder without weights, which nothing loads; then the rest of the new export lies in
`.export.complete`.
"""

import fcntl
import filecmp
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from expertmesh.parallel import ranks

SUMS = "SHA256SUMS"  # of an export's files
WHOLE = ".export.complete"  # in an export's folder, until its files are moved there
Digests = dict[str, str]  # SHA-256 of every file, by its path in the folder

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
# model.safetensors, its index, and both with a variant: what a reader looks for first
_FIRST = re.compile(r"(\w+)(?:(\.[^.]+)?\.safetensors|\.safetensors\.index(\.[^.]+)?\.json)")
_held: set[Path] = set()
log = logging.getLogger(__name__)


class FolderInUseError(OSError):
    """Another run writes into the folder."""


class DamagedError(ValueError):
    """What is on the disk is not what was saved."""


@contextmanager
def folder_lock(folder: str | Path, group: Any = None) -> Iterator[None]:
    """Keep other processes from writing into `folder` (made if need be) while the block runs.

    Rank 0 of `group` holds the lock for all ranks until the block ends or the process dies. Blocks of one process may
    be nested. Raises FolderInUseError if another process holds it.
    """
    lock = Path(folder).resolve() / ".lock"
    with ExitStack() as stack:
        with ranks.fail_together(group):
            if ranks.rank(group) == 0 and lock not in _held:
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(lock.open("a"))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a fork that outlives us does not keep this one
                except (BlockingIOError, PermissionError):
                    raise FolderInUseError(
                        f"Another run writes into {folder}, and two would mix their files. Write into another folder, "
                        f"or end that run."
                    ) from None
                except OSError as error:
                    log.warning("%s cannot be locked (%s): let no other run write there.", folder, error)
                _held.add(lock)
                stack.callback(_held.discard, lock)
                stack.callback(lock.unlink, missing_ok=True)
        yield


@contextmanager
def staging_folder(
    staging: Path, begin: Callable[[], None], move: Callable[[Digests], None], group: Any
) -> Iterator[None]:
    """A block in which every rank of `group` writes its own files into `staging`, a new folder.

    Rank 0 calls `begin` before, and `move` when all files are on the disk. No other run writes beside it meanwhile.
    """
    with folder_lock(staging.parent, group):
        with ranks.fail_together(group):
            if ranks.rank(group) == 0:
                begin()
                staging.mkdir()
                sync(staging.parent)
        with ranks.fail_together(group):
            yield
        with ranks.fail_together(group):
            for path in [*sorted(staging.rglob("*"), reverse=True), staging]:  # on every rank: fsync reaches its own
                sync(path)
        files = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
        sums = sha256_sums(staging, files, group)
        with ranks.fail_together(group):
            if ranks.rank(group) == 0:
                move(sums)


@contextmanager
def atomic_export(folder: str | Path, group: Any = None) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, what is in it takes the place of the export in `folder`.

    Every rank of `group` enters. Of the old export weights and index go, all else stays.
    """
    folder = Path(folder)
    staging = folder / ".export.incomplete"

    def move(sums: Digests) -> None:
        remove(folder / WHOLE)
        publish(staging, folder / WHOLE, SUMS, sums)
        _replace(folder, folder / WHOLE, sums)

    with folder_lock(folder, group):  # around all: who is refused must not remove what the other run has staged
        try:
            with staging_folder(staging, lambda: remove(staging), move, group):
                yield staging
        finally:
            if ranks.rank(group) == 0:
                remove(staging)


def publish(staging: Path, target: Path, manifest: str, sums: Digests) -> None:
    """Give a folder whose files are on the disk its name, with one rename. `manifest`: a file for `sha256sum -c`."""
    (staging / manifest).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    sync(staging / manifest)
    sync(staging)
    os.rename(staging, target)
    sync(target.parent)


def _replace(folder: Path, whole: Path, sums: Digests) -> None:
    kinds = {_kind(name) for name in sums} - {None}
    weights = [name for name in {*sums, *os.listdir(folder)} if _kind(name) in kinds]
    first = {name for name in weights if _FIRST.fullmatch(name)}
    rest = sums.keys() - first
    remove(folder / SUMS)
    same = all((folder / name).is_file() and filecmp.cmp(whole / name, folder / name, False) for name in rest)
    for name in () if same else first:  # else the one weights file takes the other's place at once
        remove(folder / name)
    for names in (rest, sums.keys() & first):
        sync(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(whole / name, folder / name)
    sync(folder)
    for name in {*weights} - sums.keys():
        remove(folder / name)
    os.replace(whole / SUMS, folder / SUMS)
    remove(whole)


def _kind(name: str) -> tuple[str, str] | None:
    """Of a weights file or an index its stem and its variant: an export replaces all of the same kind."""
    match = _FIRST.fullmatch(_SHARD.sub("", name))
    return match and (match[1], match[2] or match[3] or "")


def verify_sums(folder: str | Path, together: bool = False) -> None:
    """Compare an export with its SHA256SUMS, where it has one. `fail_together`: all ranks call it, and share the work.

    Raises DamagedError naming the weights that differ, or where they lie if an export was cut short. Configurations are
    files that people edit: a warning names them.
    """
    path, whole = Path(folder, SUMS), Path(folder, WHOLE)
    cut_short = whole.is_dir() and any(whole.iterdir())
    if cut_short and not any(_FIRST.fullmatch(name) for name in os.listdir(folder)):
        raise DamagedError(
            f"An export into {folder} was cut short when it was complete: move what is in {whole} into {folder}."
        )
    sums = read_sums(path) if path.is_file() else {}
    there = [name for name in sums if not {"/", ".."} & {*Path(name).parts} and Path(folder, name).is_file()]
    found = sha256_sums(Path(folder), there, None if together else ranks.ALONE)
    changed = sorted(name for name in sums if found.get(name) != sums[name])
    weights = [name for name in changed if ".safetensors" in name]
    if weights:
        raise DamagedError(
            f"{', '.join(weights)} in {folder} is not what was saved: it differs from {SUMS}. Restore it from a copy; "
            f"if it was changed on purpose, delete {SUMS}."
        )
    if changed and ranks.rank() == 0:
        log.warning("%s in %s is not what was saved: it differs from %s.", ", ".join(changed), folder, SUMS)


def read_sums(path: Path) -> Digests:
    """What a list of sums, as `sha256sum` writes it, says. Raises DamagedError if it is none."""
    lines = [re.fullmatch(r"(\S+) [ *](.+)", line) for line in path.read_text(errors="replace").splitlines()]
    if None in lines:
        raise DamagedError(f"{path} cannot be read as a list of SHA-256 sums. Restore it from a copy.")
    return {line[2]: line[1] for line in lines if line}


def sha256_sums(folder: Path, names: Iterable[str], group: Any = None) -> Digests:
    """The SHA-256 of these files, sorted. Each is read by one rank of `group`, and every rank gets all."""
    mine = sorted(names)[ranks.rank(group) :: ranks.world_size(group)]
    with ranks.fail_together(group), ThreadPoolExecutor() as pool:  # hashing releases the GIL
        found = dict(zip(mine, pool.map(lambda name: _digest(folder / name), mine), strict=True))
    return dict(sorted(item for part in ranks.all_gather_object(found, group) for item in part.items()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a folder with all in it, or a file; of a link the link alone. Nothing there is fine, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
