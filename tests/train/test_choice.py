"""What `auto` becomes on a GPU that a test says is there, and what fits when memory runs out."""

import pytest
import torch
import yaml

from expertmesh import backends, cli
from expertmesh.bench.tiny import tiny_config
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.layouts import layout_of
from expertmesh.train import launch, run
from expertmesh.train.config import ConfigError, load_config
from expertmesh.train.planned import (
    ROOM,
    fastest_settings,
    job_of,
    next_setting,
    open_keys,
    plan_of,
    resolve_auto,
    with_keys,
)
from tests.train.runs import tiny_run
from tests.train.test_launch import pids, start, wait_until_gone

MIB = 2**20
AUTO = {"parallel": "auto", "train__per_device_train_batch_size": "auto"}


def with_memory(mib):
    """An H200 with so little memory; CUDA itself takes 1,024 MiB of it."""
    return GPUS["h200"].__class__(**{**vars(GPUS["h200"]), "memory": mib * MIB})


@pytest.fixture
def config(tmp_path):
    """A run of a model of some megabytes, with changes."""
    model = tiny_config("qwen3_moe", hidden_size=512, vocab_size=8192, num_hidden_layers=1, mlp_only_layers=[])
    model.save_pretrained(tmp_path / "model")

    def config(**changes):
        more = {"model__name": tmp_path / "model", "model__dtype": "bfloat16", "data__max_length": 512}
        return load_config(None, tiny_run(tmp_path / "run", **more | changes))

    return config


def needed(config, gpu, ranks=1):
    return plan_of(config, ranks, gpu).layout.memory.needed


def test_auto_is_the_fastest_that_fits_with_room(config):
    config = config(**AUTO)
    assert open_keys(config) == ["train.per_device_train_batch_size", "parallel.ep_size"]
    gpu = with_memory(1300)
    found = fastest_settings(config, 2, gpu)
    assert open_keys(found) == [] and found.parallel.ep_size in (1, 2)
    rows, best = found.train.per_device_train_batch_size, plan_of(found, 2, gpu).layout
    assert best.memory.needed <= ROOM * gpu.memory
    more = with_keys(found, {"train.per_device_train_batch_size": 2 * rows})
    assert needed(more, gpu, 2) > ROOM * gpu.memory
    other = with_keys(found, {"parallel.ep_size": 3 - found.parallel.ep_size})
    assert layout_of(job_of(other, 2), gpu).speed.step >= best.speed.step


def test_what_is_given_stays(config):
    found = fastest_settings(config(parallel__ep_size="auto"), 2, with_memory(2048))
    assert found.train.per_device_train_batch_size == 4 and found.parallel.ep_size in (1, 2)
    mixed = load_config(None, ["parallel=auto", "parallel.dp_replicate_size=2"])
    assert mixed.parallel.ep_size == "auto" and mixed.parallel.dp_replicate_size == 2


def test_where_nothing_fits_the_error_says_what_does(config):
    with pytest.raises(ConfigError, match=r"nothing that fits 1 x h200\. This fits: lora={}"):
        fastest_settings(config(train__per_device_train_batch_size="auto"), 1, with_memory(1128))
    assert needed(config(train__per_device_train_batch_size=1, lora="{}"), GPUS["h200"]) <= ROOM * 1128 * MIB
    with pytest.raises(ConfigError, match="take more GPUs"):
        fastest_settings(config(train__per_device_train_batch_size="auto"), 1, with_memory(1000))


def test_without_a_gpu_auto_is_an_error_except_for_one_rank_s_experts(config, monkeypatch):
    with pytest.raises(ConfigError, match=r"train.per_device_train_batch_size: `auto` .*set a number"):
        resolve_auto(config(**AUTO), 1)
    assert resolve_auto(config(parallel="auto"), 1).parallel.ep_size == 1
    monkeypatch.setattr(backends, "gpu", lambda: ("NVIDIA L40S", 48 * 2**30))
    with pytest.raises(ConfigError, match=r"parallel.ep_size: `auto` .* set a number: .* NVIDIA L40S, only of h200"):
        resolve_auto(config(parallel="auto"), 2)


def test_ranks_are_told_what_was_chosen_for_them(config, monkeypatch):
    given = config(parallel="auto")
    commands = []
    monkeypatch.setattr(backends, "gpu", lambda: ("NVIDIA H200", 2048 * MIB))
    monkeypatch.setattr(launch, "launch", lambda command, *_: commands.append(command) or 0)
    words = [f"model.name={given.model.name}", "parallel=auto", "parallel.nproc=2", "data.max_length=64"]
    assert cli.run(["train", *words, f"save.output_dir={given.save.output_dir}"]) == 0
    assert commands[0][-1] in ("parallel.ep_size=1", "parallel.ep_size=2")


def test_a_run_goes_on_with_what_it_chose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "gpu", lambda: ("NVIDIA H200", 1200 * MIB))
    words = tiny_run(tmp_path, **AUTO, train__max_steps=2, save__save_steps=2, data__max_length=64)
    assert cli.run(["train", *words]) == 0
    rows = load_config(tmp_path / "config.yaml").train.per_device_train_batch_size
    assert f"auto: train.per_device_train_batch_size={rows} parallel.ep_size=1" in capsys.readouterr().err
    monkeypatch.setattr(backends, "gpu", lambda: None)
    words += ["save.resume_from_checkpoint=auto", "train.max_steps=3"]
    again = load_config(None, words)
    assert resolve_auto(again, 1).train.per_device_train_batch_size == rows
    assert cli.run(["train", *words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "Not checked: keys that are `auto`" in said.err and "ep_size: auto" in said.out


@pytest.mark.parametrize(
    ("mib", "changes", "proposed"),
    [
        (1190, {}, {"train.per_device_train_batch_size=", "train.gradient_accumulation_steps="}),
        (1190, {"train__gradient_release": "running"}, {"train.activation_checkpointing=true"}),
        (1130, {}, {"train.optim_states=8bit", "train.gradient_release=running"}),
    ],
)
def test_the_next_setting_fits_and_changes_as_little_as_it_can(config, mib, changes, proposed):
    config, gpu = config(train__per_device_train_batch_size=16, **changes), with_memory(mib)
    assert needed(config, gpu) > gpu.memory
    line = next_setting(config, 1, gpu, gpu.memory).removeprefix("This fits: ")
    assert all(key in line for key in proposed), line
    keys = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in line.split())}
    assert needed(with_keys(config, keys), gpu) <= gpu.memory
    rows, steps = keys.get("train.per_device_train_batch_size", 16), keys.get("train.gradient_accumulation_steps", 1)
    assert int(rows) * int(steps) == 16 or "train.gradient_release" in line or changes


def test_out_of_memory_ends_in_one_paragraph_with_what_fits(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(run, "load_model", full)
    monkeypatch.setattr(backends, "gpu", lambda: ("NVIDIA H200", 1200 * MIB))
    assert cli.run(["train", *tiny_run(tmp_path, train__per_device_train_batch_size=256)]) == 1
    said = capsys.readouterr().err
    (paragraph,) = [line for line in said.splitlines() if line.startswith("expertmesh: error: ")]
    assert "The GPU ran out of memory (CUDA out of memory). By its plan the run needs 1.2 of 1.2 GiB" in paragraph
    line = paragraph.partition("This fits: ")[2]
    assert line.startswith("train.") and f"Plan: This fits: {line}" in said and "Traceback" not in said


ONE_IS_FULL = """
ready()
import torch
from expertmesh import backends, cli
from expertmesh.train import run
backends.gpu = lambda: ("NVIDIA H200", 1200 * 2**20)
load = run.load_model
def load_model(config):
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return load(config)
run.load_model = load_model
sys.argv[1:] = {words}
cli.main()
"""


@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all(tmp_path):
    words = ["train", *tiny_run(tmp_path / "run", parallel__ep_size=2, train__per_device_train_batch_size=256)]
    ranks = start(ONE_IS_FULL.format(words=words), 2, tmp_path)
    all_pids = pids(tmp_path, 2)
    said = "".join(ranks.communicate(timeout=200))
    assert ranks.returncode == 1 and wait_until_gone(all_pids)
    assert said.count("expertmesh: error: The GPU ran out of memory") == 1 and "Traceback" not in said
    assert said.count(". This fits: train.") == 1
