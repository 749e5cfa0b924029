"""`expertmesh train` on two ranks of this machine: the same run, stopped and continued like one process."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertmesh import cli
from expertmesh.train.metrics import read_metrics
from tests.cli.test_verbs import process
from tests.train.runs import checkpoint, tiny_run

TWO = {"parallel__nproc": 2, "parallel__ep_size": 2, "train__per_device_train_batch_size": 2}
ALIKE = {"log__logging_steps": 1, "moe__router_aux_loss_coef": 0}  # balance is weighed over each rank's own tokens


def steps(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def test_two_ranks_train_what_one_process_trains(tmp_path):
    assert cli.run(["train", *tiny_run(tmp_path / "one", **ALIKE)]) == 0
    run = process("train", *tiny_run(tmp_path / "two", **ALIKE, **TWO))
    said = "".join(run.communicate(timeout=240))
    assert run.returncode == 0, said
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 4
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert all(0 <= found < 1 for found in together["moe_layers"].pop("rank_vio"))  # two ranks: 1 is all on one
        # counts of all ranks, so the very same numbers
        assert together["moe_layers"] == alone["moe_layers"]
    assert said.count("step 4/4  loss") == said.count("Done: the model is in") == 1
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert {file.name for file in (tmp_path / "two").iterdir()} == names | {"logs"}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "two" / "env.json").read_text())["fusions"]


def test_sigterm_saves_once_for_all_ranks_and_the_run_goes_on(tmp_path):
    endless = {"log__logging_steps": 1, "data__eval_fraction": 0, "train__max_steps": 100000, **TWO}
    run = process("train", *tiny_run(tmp_path, **endless))
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said = "".join(run.communicate(timeout=60))
    assert run.returncode == 75, said
    assert said.count("To resume: expertmesh train") == 1 and "Traceback" not in said
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    reached = int(checkpoint.name.partition("-")[2])
    assert steps(tmp_path)[-1]["step"] == reached
    # on one process, which has another layout
    more = {**endless, "parallel__nproc": 1, "parallel__ep_size": 1, "train__max_steps": reached + 2}
    assert cli.run(["train", *tiny_run(tmp_path, **more, save__resume_from_checkpoint="auto")]) == 0
    assert [record["step"] for record in steps(tmp_path)] == list(range(1, reached + 3))


def test_adapters_over_experts_in_4_bits_go_on_on_two_ranks_from_a_checkpoint_of_one(tmp_path):
    changes = ALIKE | {
        "model__name": checkpoint(hidden_size=64, moe_intermediate_size=64),
        "lora": "{r: 4, target_modules: all-linear}",
        "quantization__experts": "nf4",
        "save__save_steps": 2,
    }
    assert cli.run(["train", *tiny_run(tmp_path / "one", **changes)]) == 0
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    run = process("train", *tiny_run(tmp_path / "two", **changes, **TWO, save__resume_from_checkpoint="auto"))
    said = "".join(run.communicate(timeout=240))
    assert run.returncode == 0, said
    one, two = ([r["loss"] for r in steps(tmp_path / folder)] for folder in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one[2:], rel=1e-5)
    alone, together = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("one", "two"))
    assert alone.keys() == together.keys() and any(".experts." in name for name in alone)
    for name, weight in alone.items():
        assert (together[name] - weight).abs().max() <= 1e-5, name
    assert (tmp_path / "two" / "checkpoint-4" / "optimizer").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora__r": 4},
        {"train__activation_checkpointing": "true", "data__packing": "true", "data__max_length": 32},
        {"parallel__ep_size": 1, "parallel__dp_replicate_size": 2},
    ],
    ids=str,
)
def test_other_runs_on_two_ranks(tmp_path, changes):
    alone = {key: value for key, value in changes.items() if not key.startswith("parallel__")}
    assert cli.run(["train", *tiny_run(tmp_path / "one", **ALIKE, **alone)]) == 0
    run = process("train", *tiny_run(tmp_path / "two", **ALIKE, **{**TWO, **changes}))
    said = "".join(run.communicate(timeout=240))
    assert run.returncode == 0, said
    one, two = ([r["loss"] for r in steps(tmp_path / folder)] for folder in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_is_killed_in_training_ends_the_run(tmp_path):
    run = process("train", *tiny_run(tmp_path, log__logging_steps=1, train__max_steps=100000, **TWO))
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = "".join(run.communicate(timeout=15))
    assert run.returncode == 1
    assert said.count("expertmesh: error:") == 1 and "rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said, said
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_an_error_of_the_ranks_is_one_paragraph(tmp_path):
    run = process("train", *tiny_run(tmp_path, parallel__nproc=2, parallel__ep_size=3))
    said = "".join(run.communicate(timeout=120))
    assert run.returncode == 2
    assert said.count("expertmesh: error: parallel: ep_size=3 does not fit") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_tasks_of_a_slurm_job_are_ranks(tmp_path, monkeypatch):
    job = {"NTASKS": "2", "JOB_ID": str(os.getpid()), "JOB_NODELIST": "localhost"}
    tasks = []
    for rank in "01":
        for name, value in {**job, "PROCID": rank, "LOCALID": rank}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        tasks.append(process("train", *tiny_run(tmp_path, **TWO)))
    first, second = ("".join(task.communicate(timeout=200)) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], first + second
    assert "Done: the model is in" in first and "Done" not in second and len(steps(tmp_path)) == 2
