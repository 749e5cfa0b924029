"""Folders of files that are published atomically, by one run at a time.

Files are written into a hidden folder. When they and their checksums are on the disk, one rename makes the folder a
checkpoint (checkpoint/publish.py). An export may replace another one, so its files are moved one by one. The entry file
that a reader opens first (the index or the only weights file) is deleted before and moved last. So a kill leaves the
old export, the new one, or a folder without an entry file, which nothing loads. The rest is then in `.export.complete`.
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

SUMS = "SHA256SUMS"  # checksums of an export's files
WHOLE = ".export.complete"  # subfolder of an export's folder with the files that are not moved yet
Digests = dict[str, str]  # {path in the folder: SHA-256}

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
# entry files: model.safetensors, its index, and both with a variant
_ENTRY = re.compile(r"(\w+)(?:(\.[^.]+)?\.safetensors|\.safetensors\.index(\.[^.]+)?\.json)")
_locked: set[Path] = set()
log = logging.getLogger(__name__)


class FolderInUseError(OSError):
    """Another run writes into the folder."""


class DamagedError(ValueError):
    """A file on the disk differs from what was saved."""


@contextmanager
def folder_lock(folder: str | Path, group: Any = None) -> Iterator[None]:
    """Context manager that locks `folder`, which is created if needed, against writers of other processes. Rank 0 of
    `group` holds the lock for all ranks until the block ends or the process dies. A process may nest blocks. Raises
    FolderInUseError if another process holds the lock."""
    lock = Path(folder).resolve() / ".lock"
    with ExitStack() as stack:
        with ranks.fail_together(group):
            if ranks.rank(group) == 0 and lock not in _locked:
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(lock.open("a"))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by a fork
                except (BlockingIOError, PermissionError):
                    raise FolderInUseError(
                        f"Another run writes into {folder}, and two would mix their files. Write into another folder, "
                        f"or end that run."
                    ) from None
                except OSError as error:
                    log.warning("%s cannot be locked (%s): let no other run write there.", folder, error)
                _locked.add(lock)
                stack.callback(_locked.discard, lock)
                stack.callback(lock.unlink, missing_ok=True)
        yield


@contextmanager
def staging_folder(
    staging: Path, begin: Callable[[], None], move: Callable[[Digests], None], group: Any
) -> Iterator[None]:
    """Context manager in which every rank of `group` writes its own files into `staging`, a new folder. Rank 0 calls
    `begin` before, and `move` when all files are on the disk. The parent folder is locked meanwhile."""
    with folder_lock(staging.parent, group):
        with ranks.fail_together(group):
            if ranks.rank(group) == 0:
                begin()
                staging.mkdir()
                sync(staging.parent)
        with ranks.fail_together(group):
            yield
        with ranks.fail_together(group):
            for path in [*sorted(staging.rglob("*"), reverse=True), staging]:  # fsync writes only what this host cached
                sync(path)
        files = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
        sums = sha256_sums(staging, files, group)
        with ranks.fail_together(group):
            if ranks.rank(group) == 0:
                move(sums)


@contextmanager
def atomic_export(folder: str | Path, group: Any = None) -> Iterator[Path]:
    """Context manager that yields an empty folder. When the block ends, its files replace the export in `folder`. Every
    rank of `group` must enter. Old weights and their index are deleted; other files stay unless replaced."""
    folder = Path(folder)
    staging = folder / ".export.incomplete"

    def move(sums: Digests) -> None:
        remove(folder / WHOLE)
        publish(staging, folder / WHOLE, SUMS, sums)
        _replace(folder, folder / WHOLE, sums)

    with folder_lock(folder, group):  # around all: a refused run must not remove the other's files
        try:
            with staging_folder(staging, lambda: remove(staging), move, group):
                yield staging
        finally:
            if ranks.rank(group) == 0:
                remove(staging)


def publish(staging: Path, target: Path, manifest: str, sums: Digests) -> None:
    """Write `sums` to the file `manifest` in `staging`, then rename it to `target`. Its files must be on the disk."""
    (staging / manifest).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    sync(staging / manifest)
    sync(staging)
    os.rename(staging, target)
    sync(target.parent)


def _replace(folder: Path, whole: Path, sums: Digests) -> None:
    kinds = {_weights_kind(name) for name in sums} - {None}
    weights = [name for name in {*sums, *os.listdir(folder)} if _weights_kind(name) in kinds]
    entries = {name for name in weights if _ENTRY.fullmatch(name)}
    rest = sums.keys() - entries
    remove(folder / SUMS)
    same = all((folder / name).is_file() and filecmp.cmp(whole / name, folder / name, False) for name in rest)
    for name in () if same else entries:  # if only the single weights file differs, it is replaced atomically
        remove(folder / name)
    for names in (rest, sums.keys() & entries):
        sync(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(whole / name, folder / name)
    sync(folder)
    for name in {*weights} - sums.keys():
        remove(folder / name)
    os.replace(whole / SUMS, folder / SUMS)
    remove(whole)


def _weights_kind(name: str) -> tuple[str, str] | None:
    """Return (stem, variant) of a weights file or an index. An export replaces all files of the same kind."""
    match = _ENTRY.fullmatch(_SHARD.sub("", name))
    return match and (match[1], match[2] or match[3] or "")


def verify_sums(folder: str | Path, together: bool = False) -> None:
    """Compare an export with its SHA256SUMS, if it has one. `together`: all ranks must call it, and share the work.
    Raises DamagedError that names the weights that differ, or where the files of an interrupted export are. Other files
    that differ, such as an edited configuration, are named in a warning."""
    path, whole = Path(folder, SUMS), Path(folder, WHOLE)
    cut_short = whole.is_dir() and any(whole.iterdir())
    if cut_short and not any(_ENTRY.fullmatch(name) for name in os.listdir(folder)):
        raise DamagedError(
            f"An export into {folder} was cut short while its files were moved: move what is in {whole} into {folder}."
        )
    sums = read_sums(path) if path.is_file() else {}
    present = [name for name in sums if not {"/", ".."} & {*Path(name).parts} and Path(folder, name).is_file()]
    actual = sha256_sums(Path(folder), present, None if together else ranks.ALONE)
    changed = sorted(name for name in sums if actual.get(name) != sums[name])
    weights = [name for name in changed if ".safetensors" in name]
    if weights:
        raise DamagedError(
            f"{', '.join(weights)} in {folder} is not what was saved: it differs from {SUMS}. Restore it from a copy; "
            f"if it was changed on purpose, delete {SUMS}."
        )
    if changed and ranks.rank() == 0:
        log.warning("%s in %s is not what was saved: it differs from %s.", ", ".join(changed), folder, SUMS)


def read_sums(path: Path) -> Digests:
    """Parse the output of `sha256sum`. Raises DamagedError if it has another format."""
    lines = [re.fullmatch(r"(\S+) [ *](.+)", line) for line in path.read_text(errors="replace").splitlines()]
    if None in lines:
        raise DamagedError(f"{path} cannot be read as a list of SHA-256 sums. Restore it from a copy.")
    return {line[2]: line[1] for line in lines if line}


def sha256_sums(folder: Path, names: Iterable[str], group: Any = None) -> Digests:
    """Return the SHA-256 of these files, sorted by name, on all ranks of `group`, which share the work."""
    mine = sorted(names)[ranks.rank(group) :: ranks.world_size(group)]
    with ranks.fail_together(group), ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = dict(zip(mine, pool.map(lambda name: _digest(folder / name), mine), strict=True))
    return dict(sorted(item for part in ranks.all_gather_object(digests, group) for item in part.items()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a folder with its content, a file, or a link without its target, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
