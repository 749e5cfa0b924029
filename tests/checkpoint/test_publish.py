"""A checkpoint appears whole or not at all, and every byte of it is checked."""

import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from expertmesh.checkpoint.publish import (
    MANIFEST,
    checkpoints,
    newest_complete,
    prune,
    publishing,
    verify,
)
from expertmesh.weights.files import DamagedError, read_sums


def publish(output_dir, step, **files):
    with publishing(output_dir, step) as folder:
        (folder / "inner").mkdir()
        for name, content in ({"weights": b"w" * 1000, "inner/state": b"s" * 10} | files).items():
            (folder / name).write_bytes(content)
    return output_dir / f"checkpoint-{step}"


def test_a_published_checkpoint_holds_its_files_and_passes(tmp_path):
    checkpoint = publish(tmp_path, 3)
    assert read_sums(checkpoint / MANIFEST).keys() == {"weights", "inner/state"}
    assert subprocess.run(["sha256sum", "--strict", "--quiet", "-c", MANIFEST], cwd=checkpoint).returncode == 0
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    assert newest_complete(tmp_path) == checkpoint
    verify(checkpoint)


def test_nothing_is_published_after_an_error_and_the_leftover_goes_with_the_next_save(tmp_path):
    with pytest.raises(OSError, match="disk full"), publishing(tmp_path, 3) as folder:
        (folder / "weights").write_bytes(b"half")
        raise OSError("disk full")
    assert os.listdir(tmp_path) == [".checkpoint-3.incomplete"]
    assert newest_complete(tmp_path) is None
    publish(tmp_path, 4)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_a_published_checkpoint_is_never_replaced(tmp_path):
    publish(tmp_path, 3)
    with pytest.raises(FileExistsError, match=r"checkpoint-3 exists.*another folder"):
        publish(tmp_path, 3, weights=b"other")
    verify(tmp_path / "checkpoint-3")


def test_the_newest_complete_one_is_found_by_number_and_others_are_named(tmp_path, caplog):
    publish(tmp_path, 9)
    newest = publish(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / ".checkpoint-12.incomplete").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == newest
    assert "checkpoint-11 is skipped" in caplog.text
    assert newest_complete(tmp_path / "nowhere") is None


def test_old_checkpoints_go_and_the_only_complete_one_never_does(tmp_path):
    for step in (1, 2, 3, 10):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # incomplete: it neither counts nor goes
    prune(tmp_path, 2, protect=[tmp_path / "checkpoint-1"])
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 10, 11]
    prune(tmp_path, 1, protect=[tmp_path / "checkpoint-1"])  # which does not take the newest one's place
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 10, 11]
    prune(tmp_path, 1)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 11]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_a_linked_checkpoint_is_one_and_its_deletion_deletes_the_link(tmp_path):
    away = publish(tmp_path / "away", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(away)
    (tmp_path / "run" / ".checkpoint-7.deleted").symlink_to(away)
    (tmp_path / "run" / "checkpoint-8").symlink_to(tmp_path / "nowhere")
    verify(tmp_path / "run" / "checkpoint-1")
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    publish(tmp_path / "run", 2)
    prune(tmp_path / "run", 1)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-2", "checkpoint-8"]
    verify(away)
    with pytest.raises(FileExistsError, match="checkpoint-8 exists"):
        publish(tmp_path / "run", 8)


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append("rename") or rename(a, b))
    publish(tmp_path.resolve(), 3)
    before, after = done[: done.index("rename")], done[done.index("rename") :]
    staging = str(tmp_path.resolve() / ".checkpoint-3.incomplete")
    for name in ("weights", "inner/state", "inner", MANIFEST):
        assert f"{staging}/{name}" in before
    assert before.index(f"{staging}/weights") < before.index(f"{staging}/{MANIFEST}")
    assert before[-1] == staging, "the list of files comes after the last of them"
    assert str(tmp_path.resolve()) in after
    done.clear()
    publish(tmp_path.resolve(), 4)
    done.clear()
    prune(tmp_path.resolve(), 1)
    assert done == ["rename", str(tmp_path.resolve())]


def test_two_processes_do_not_save_into_one_folder_at_a_time(tmp_path):
    with publishing(tmp_path, 1):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        other = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "Another run writes into" in other.stderr.splitlines()[-1]
    assert [step for step, _ in checkpoints(tmp_path)] == [1]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with publishing("~/run", 1) as folder:
        (folder / "weights").touch()
    assert newest_complete("~/run") == tmp_path / "run" / "checkpoint-1"


def test_a_half_deleted_checkpoint_is_no_checkpoint(tmp_path):
    publish(tmp_path, 1).rename(tmp_path / ".checkpoint-1.deleted")
    assert newest_complete(tmp_path) is None
    publish(tmp_path, 2)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


OUTSIDE = hashlib.sha256(b"outside").hexdigest()


def add(folder, line):
    """Another line of the manifest."""
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + line + "\n")


def swap(path):
    """Move a part of a checkpoint out, and link to it."""
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: os.truncate(folder / "weights", 999), "weights has changed"),
        (lambda folder: os.remove(folder / "inner/state"), "inner/state is missing"),
        (lambda folder: (folder / "inner/more").touch(), "inner/more is not in the manifest"),
        (lambda folder: os.truncate(folder / MANIFEST, 20), "checkpoint.sha256 cannot be read"),
        (lambda folder: add(folder, "weights"), "checkpoint.sha256 cannot be read"),
        (lambda folder: (folder / MANIFEST).write_bytes(bytes(range(256))), "checkpoint.sha256 cannot be read"),
        (lambda folder: add(folder, f"{OUTSIDE}  weights"), "weights has changed"),
        (lambda folder: add(folder, f"{OUTSIDE}  ../../outside"), "../../outside is missing"),
        (lambda folder: add(folder, f"{OUTSIDE}  {folder.parent.parent / 'outside'}"), "outside is missing"),
        (lambda folder: add(folder, f"{OUTSIDE}  inner/../weights"), "inner/../weights is missing"),
        (lambda folder: (folder / "more").symlink_to(folder / "weights"), "more is a link, a pipe or a device"),
        (lambda folder: (folder / "more").symlink_to(folder / "inner"), "more is a link, a pipe or a device"),
        (lambda folder: os.mkfifo(folder / "more"), "more is a link, a pipe or a device"),
        (lambda folder: swap(folder / "weights"), "weights is a link, a pipe or a device"),
        (lambda folder: swap(folder / "inner"), "inner is a link, a pipe or a device"),
    ],
)
def test_damage_is_named(damage, expected, tmp_path):
    checkpoint = publish(tmp_path / "run", 3)
    (tmp_path / "outside").write_bytes(b"outside")
    damage(checkpoint)
    with pytest.raises(DamagedError, match=re.escape(expected)):
        verify(checkpoint)


def test_any_flipped_byte_is_named(tmp_path):
    checkpoint, draw = publish(tmp_path, 3), random.Random(0)
    for name in ("weights", "inner/state"):
        good = (checkpoint / name).read_bytes()
        for _ in range(5):
            bad, at = bytearray(good), draw.randrange(len(good))
            bad[at] ^= 1 << draw.randrange(8)
            (checkpoint / name).write_bytes(bad)
            with pytest.raises(DamagedError, match=f"{name} has changed"):
                verify(checkpoint)
        (checkpoint / name).write_bytes(good)
    verify(checkpoint)


def test_a_checkpoint_without_a_manifest_is_not_verified(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        verify(tmp_path / "checkpoint-1")


SAVE_FOREVER = """
import sys
from pathlib import Path
from expertmesh.checkpoint.publish import publishing, prune
print("ready", flush=True)
for step in range(10**6):
    with publishing(sys.argv[1], step) as folder:
        for name in "abcd":
            (folder / name).write_bytes(bytes([step % 256]) * 100_000)
    prune(sys.argv[1], 2)
"""


def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint(tmp_path):
    draw = random.Random(1)
    for kill in range(5):
        folder = tmp_path / str(kill)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SAVE_FOREVER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"ready\n"
        while newest_complete(folder) is None:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        verify(newest_complete(folder))
