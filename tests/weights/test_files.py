"""An export appears whole or not at all, whatever was there before; one run writes into a folder at a time."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

import expertmesh
from expertmesh import backends
from expertmesh.weights import files
from expertmesh.weights.files import (
    SUMS,
    WHOLE,
    DamagedError,
    FolderInUseError,
    atomic_export,
    folder_lock,
    verify_sums,
)
from expertmesh.weights.read import load_weights
from expertmesh.weights.write import save_sharded
from tests.distributed.ranks import on_ranks
from tests.models import SEED, load_ours

INDEX = "model.safetensors.index.json"


def export(word: str, shards: int) -> dict[str, str]:
    """A small export: its configuration and weights say who wrote them."""
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)] if shards else []
    weights = {name: word for name in names or ["model.safetensors"]}
    return {"config.json": word, **weights, **({INDEX: json.dumps({"weight_map": weights})} if names else {})}


def write(folder: Path, content: dict[str, str]) -> None:
    with atomic_export(folder) as staging:
        for name, text in content.items():
            (staging / name).write_text(text)
            os.utime(staging / name, (0, 0))  # many file systems' clocks are coarse


def read(folder: Path) -> str | None:
    """What Transformers would load: the words of configuration and weights, joined; None where it finds no weights."""
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif (folder / INDEX).exists():
        names = list(json.loads((folder / INDEX).read_text())["weight_map"])
    else:
        return None
    return "+".join(sorted({(folder / name).read_text() for name in ("config.json", *names)}))


class Cut(BaseException):
    """As a kill, or as Ctrl-C."""


def cut_short(operation: int, monkeypatch, action, killed: bool) -> bool:
    """Run `action`, whose n-th operation on files fails, and if `killed` all later ones. Whether it came so far."""
    left = operation

    def failing(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0 if killed else left == -1:
                raise Cut
            return call(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "rename"), (files, "remove"), (files, "sync")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        try:
            action()
        except Cut:
            return True
    return False


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 3), (0, 2), (3, 0)])
@pytest.mark.parametrize(
    ("same_config", "killed"),
    [(True, True), (False, True), *(pytest.param(same, False, marks=pytest.mark.slow) for same in (True, False))],
)
def test_cut_short_at_any_moment_it_leaves_one_export_or_says_where(
    before, after, same_config, killed, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nobody pulls the plug here
    seen, old, new = set(), export("old", before), export("new", after)
    new |= {"config.json": old["config.json"]} if same_config else {}
    all_new = "new+old" if same_config else "new"
    for operation in range(100):
        folder = tmp_path / str(operation)
        write(folder, old)
        was_cut = cut_short(operation, monkeypatch, lambda folder=folder: write(folder, new), killed)
        found = read(folder)
        assert found in ("old", None, all_new), operation
        seen.add(found)
        if found is None:
            with pytest.raises(DamagedError, match="move what is in"):
                verify_sums(folder)
            for path in (folder / WHOLE).iterdir():
                path.rename(folder / path.name)
            assert read(folder) == all_new, operation
        verify_sums(folder)  # there are none yet, or they are those of these files
        write(folder, new)  # nothing that it left is in the way
        assert read(folder) == all_new and set(os.listdir(folder)) == {*new, SUMS}
        if not was_cut:
            break
    assert {"old", all_new} <= seen
    assert not (same_config and after == 0 and None in seen), "one file takes the place of another in one step"


def test_an_export_that_was_cut_short_stays_until_another_one_is_whole(tmp_path):
    load_ours("qwen3_moe").config.save_pretrained(tmp_path)
    (tmp_path / WHOLE).mkdir()
    (tmp_path / WHOLE / "model.safetensors").write_text("new")
    with pytest.raises(OSError, match="No space"), atomic_export(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(DamagedError, match="was cut short"):
        expertmesh.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == {WHOLE, "config.json"}


def test_everything_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    """For exports; tests/checkpoint has the same for checkpoints."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("move", str(a))) or replace(a, b))
    folder = tmp_path.resolve()
    write(folder, export("new", 2))
    staging, whole = folder / ".export.incomplete", folder / WHOLE
    moves = [number for number, (what, _) in enumerate(done) if what == "move"]
    before = {path for what, path in done[: moves[0]] if what == "sync"}
    assert before >= {str(staging / name) for name in [*export("new", 2), SUMS]} | {str(staging)}
    *_, last_shard, index, sums = moves
    assert [done[index], done[sums]] == [("move", str(whole / INDEX)), ("move", str(whole / SUMS))]
    assert ("sync", str(folder)) in done[last_shard:index], "the shards' names are on the disk before the index"
    assert ("sync", str(folder)) in done[index:sums]


def test_what_is_the_users_own_stays(tmp_path):
    model, own = (
        load_ours("qwen3_moe"),
        ["model-of-the-user.safetensors", "model_ema.safetensors", "model.safetensors.bak", "notes.md"],
    )
    for save in (save_sharded, lambda model, folder, **options: model.save_pretrained(folder, **options)):
        folder = tmp_path / save.__name__
        save(model, folder, max_shard_size="10KB")
        for name in own:
            (folder / name).write_text("mine")
        save(model, folder)
        assert sorted(path.name for path in folder.glob("model*")) == sorted(["model.safetensors", *own[:3]])
        assert all((folder / name).read_text() == "mine" for name in own)
        assert not list(folder.glob(".*"))


def test_exports_of_several_variants_lie_beside_each_other(tmp_path):
    plain, shards = export("plain", 3), [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(tmp_path, plain)
    write(tmp_path, dict.fromkeys([*shards, "model.safetensors.index.fp16.json"], "half"))
    assert read(tmp_path) == "plain" and {*shards} < {*os.listdir(tmp_path)}
    write(tmp_path, {"model.fp16.safetensors": "half"})
    assert read(tmp_path) == "plain" and {*os.listdir(tmp_path)} == {*plain, "model.fp16.safetensors", SUMS}


def test_an_export_may_have_folders_and_an_empty_one_is_no_export_that_was_cut_short(tmp_path):
    for word in ("old", "new"):
        with atomic_export(tmp_path) as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "notes").write_text(word)
    (tmp_path / WHOLE).mkdir()
    verify_sums(tmp_path)
    assert (tmp_path / "inner" / "notes").read_text() == "new"


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("somebody else's")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").symlink_to(cache)
    write(tmp_path / "export", export("new", 0))
    assert read(tmp_path / "export") == "new" and cache.read_text() == "somebody else's"


def test_after_an_error_the_old_export_is_there_and_nothing_else(tmp_path):
    write(tmp_path, export("old", 2))
    with pytest.raises(OSError, match="No space"), atomic_export(tmp_path) as staging:
        (staging / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")
    assert read(tmp_path) == "old" and set(os.listdir(tmp_path)) == {*export("old", 2), SUMS}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}, {"variant": "fp16"}])
def test_a_flipped_byte_is_named(options, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(backends.logger(), "propagate", True)
    load_ours("qwen3_moe").save_pretrained(tmp_path, **options)
    assert subprocess.run(["sha256sum", "--strict", "--quiet", "-c", SUMS], cwd=tmp_path).returncode == 0
    verify_sums(tmp_path)
    for file in sorted(tmp_path.glob("*.safetensors"))[:2]:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DamagedError, match=f"{file.name} in .* is not what was saved"):
            expertmesh.AutoModelForCausalLM.from_pretrained(tmp_path)
        file.write_bytes(good)
    (tmp_path / "config.json").write_text("{}")  # people edit it
    verify_sums(tmp_path)
    assert "config.json in" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
        lambda folder: (folder / INDEX).write_text("{}"),
        lambda folder: (folder / SUMS).write_bytes(b"\xff\xfe  model.safetensors\n"),
    ],
    ids=["no weights", "another index", "sums that are no text"],
)
def test_whatever_is_damaged_it_is_an_error_of_damage(damage, tmp_path):
    write(tmp_path, export("new", 2))
    damage(tmp_path)
    with pytest.raises(DamagedError, match=r"^model\S* in |cannot be read"):
        verify_sums(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors"])
def test_sums_lead_to_nothing_outside_of_the_folder(name, tmp_path):
    (tmp_path / "outside.safetensors").write_text("secret")
    name, sums = name.format(tmp_path), tmp_path / "export" / SUMS
    sums.parent.mkdir()
    sums.write_text(f"{hashlib.sha256(b'secret').hexdigest()}  {name}\n")
    with pytest.raises(DamagedError, match="outside"):
        verify_sums(sums.parent)


def test_stock_reads_what_replaced_an_older_export(tmp_path):
    older, newer = load_ours("qwen3_moe"), load_ours("qwen3_moe")
    torch.nn.init.ones_(newer.lm_head.weight)
    older.save_pretrained(tmp_path, max_shard_size="40KB")
    newer.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, newer.state_dict()[name]) for name, value in loaded.state_dict().items())


# --- one run at a time

HOLD = """
import sys, time
from expertmesh.weights.files import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_run_is_refused_until_the_first_is_gone_however_it_goes(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match=r"Another run writes into .*another folder"), folder_lock(tmp_path):
            raise AssertionError("two runs in one folder")
        (tmp_path / ".export.incomplete").mkdir()
        with pytest.raises(FolderInUseError):
            write(tmp_path, export("new", 0))
        (tmp_path / ".export.incomplete").rmdir()  # what the first run writes there is still there
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with folder_lock(tmp_path):
        with folder_lock(tmp_path / "." / "inner" / ".."):  # one process may ask again
            assert os.listdir(tmp_path) == [".lock"]
        assert os.listdir(tmp_path) == [".lock"], "the outer block has it still"
    assert os.listdir(tmp_path) == []


def test_where_files_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    monkeypatch.setattr(backends.logger(), "propagate", True)
    write(tmp_path, export("new", 0))
    assert read(tmp_path) == "new" and "cannot be locked ([Errno" in caplog.text


def failing(rank: int, folder: Path) -> str:
    """Rank 1 cannot write."""
    dist.init_process_group("gloo")
    with folder_lock(folder):  # all ranks of one run together
        model_of_rank = {"config.json": "new", f"model-0000{rank + 1}-of-00002.safetensors": "new"}
        try:
            with atomic_export(folder) as staging:
                if rank == 1:
                    raise OSError(28, "No space left on device")
                for name, text in model_of_rank.items():
                    (staging / name).write_text(text)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_on_one_rank_is_one_on_all_and_the_old_export_stays(tmp_path):
    write(tmp_path, export("old", 2))
    told = on_ranks(2, failing, tmp_path, seconds=60)
    assert told[0].startswith("RanksError: rank 1: OSError") and told[1].startswith("OSError")
    assert read(tmp_path) == "old"


def test_weights_are_read_as_transformers_finds_them(tmp_path):
    """Not from whatever else lies there."""
    model = load_ours("qwen3_moe")
    model.save_pretrained(tmp_path)
    (tmp_path / "more.safetensors").write_bytes(b"nonsense")
    other = load_ours("qwen3_moe")
    torch.nn.init.ones_(other.lm_head.weight)
    load_weights(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


EXPORT_FOREVER = """
import os, sys, torch, torch.distributed as dist
import expertmesh
from expertmesh.bench.tiny import tiny_model
source, folder, setup = sys.argv[1], sys.argv[2], {"ep_size": 2} if "RANK" in os.environ else None
model = expertmesh.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, distributed_setup=setup)
for number in range(10**6):
    with torch.no_grad():
        for weight in model.parameters():
            getattr(weight, "_local_tensor", weight).fill_(number)
    model.save_pretrained(folder, max_shard_size="20KB" if number % 3 else "5GB")
    if number == 1 and os.environ.get("RANK", "0") == "0":
        print("ready", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills_of_exports_over_older_ones(ranks, tmp_path):
    """Each leaves one export, all of one moment, or what is missing to it in a hidden folder; the next is whole."""
    load_ours("qwen3_moe").save_pretrained(tmp_path / "source")
    script, draw = tmp_path / "export.py", random.Random(SEED)
    script.write_text(EXPORT_FOREVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for _ in range(20):
        command = [sys.executable, *torchrun, str(script), str(tmp_path / "source"), str(tmp_path / "export")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        except OSError:  # no weights there
            for path in (tmp_path / "export" / WHOLE).iterdir():
                path.rename(tmp_path / "export" / path.name)
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        assert len({value.item() for weight in model.parameters() for value in weight.unique()}) == 1
