"""Checkpoints of the Trainer: whole, checked, the newest is found, and a run goes on bit for bit, on ranks too."""

import functools
import json
import logging
import os
from types import SimpleNamespace
from typing import ClassVar

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments, default_data_collator

import expertmesh
from expertmesh.checkpoint.publish import checkpoints, verify
from expertmesh.train.folder import save_final
from expertmesh.weights import files
from expertmesh.weights.files import DamagedError
from tests.distributed.ranks import on_ranks, on_the_same_ranks
from tests.models import load_ours
from tests.weights.test_files import cut_short


def rows(count: int = 16) -> list[dict]:
    ids = torch.randint(0, 128, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer(folder, model=None, **options) -> expertmesh.Trainer:
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    } | options
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    model = model or load_ours("qwen3_moe", attention_dropout=0.1)
    return expertmesh.Trainer(model, arguments, default_data_collator, rows(), eval_dataset=rows(4))


def losses(run) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def weights(run) -> dict[str, torch.Tensor]:
    state = run.model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def assert_same(one: dict, other: dict):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_the_newest_checkpoint_goes_on_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert sorted(os.listdir(tmp_path / "whole")) == ["checkpoint-2", "checkpoint-4", "metrics.jsonl"]
    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_same(weights(whole), weights(resumed))
    verify(tmp_path / "again" / "checkpoint-4")


def test_a_checkpoint_of_transformers_trainer_goes_on_bit_for_bit(tmp_path, caplog):
    whole = trainer(tmp_path / "whole")
    whole.train()
    stock = transformers.Trainer(
        load_ours("qwen3_moe", attention_dropout=0.1), whole.args, default_data_collator, rows()
    )
    stock.args.output_dir = str(tmp_path / "stock")
    stock.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-2"))
    assert "no checkpoint.sha256" in caplog.text
    assert losses(resumed) == losses(whole)
    assert_same(weights(whole), weights(resumed))


def test_true_finds_the_newest_complete_one_and_moves_others_aside(tmp_path, caplog):
    whole = trainer(tmp_path, save_steps=1)
    whole.train()
    (tmp_path / "checkpoint-4" / "checkpoint.sha256").unlink()
    with caplog.at_level(logging.WARNING):
        resumed = trainer(tmp_path, save_steps=1)
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped" in caplog.text
    assert losses(resumed) == losses(whole)
    assert_same(weights(whole), weights(resumed))
    assert {"checkpoint-4", "checkpoint-4.incomplete"} <= set(os.listdir(tmp_path))


def test_true_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_would_replace_checkpoints_does_not_start(tmp_path):
    trainer(tmp_path).train()
    for resume in (None, str(tmp_path / "checkpoint-2")):
        with pytest.raises(FileExistsError, match=r"checkpoint-4 exists.*resume_from_checkpoint=True"):
            trainer(tmp_path).train(resume_from_checkpoint=resume)


def test_a_truncated_state_is_named(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    os.truncate(tmp_path / "checkpoint-2" / "trainer_state.json", 100)
    with pytest.raises(DamagedError, match=r"checkpoint-2/trainer_state.json cannot be read.*an earlier one"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_folder_is_the_runs_own_while_it_trains(tmp_path):
    class Look(transformers.TrainerCallback):
        seen: ClassVar[list] = []

        def on_step_end(self, *_, **__):
            self.seen.append(os.listdir(tmp_path))

    run = trainer(tmp_path, max_steps=1)
    run.add_callback(Look())
    run.train()
    assert ".lock" in Look.seen[0] and ".lock" not in os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "scheduler.pt", "rng_state.pth"])
def test_a_flipped_byte_is_named_before_anything_is_loaded(name, tmp_path):
    trainer(tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = trainer(tmp_path)
    before = {key: value.clone() for key, value in weights(resumed).items()}
    with pytest.raises(DamagedError, match=f"{name} has changed"):
        resumed.train(resume_from_checkpoint=True)
    assert_same(before, weights(resumed))


def test_the_best_checkpoint_stays_and_is_found_where_it_was_published(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(tmp_path, **options, **best)
    run.train()
    assert run.state.best_global_step == 1
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 4]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    assert_same(expertmesh.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict(), weights(run))


def test_only_the_model_where_only_the_model_is_asked_for(tmp_path):
    run = trainer(tmp_path, save_only_model=True)
    run.train()
    assert run.args.save_only_model
    assert not (tmp_path / "checkpoint-4" / "optimizer").exists()
    verify(tmp_path / "checkpoint-4")


def test_what_is_saved_is_not_told_otherwise_while_a_trainer_is_made(tmp_path, monkeypatch):
    """By it transformers refuses DeepSpeed and Accelerate's FSDP with the best model at the end."""
    make, seen = transformers.Trainer.create_accelerator_and_postprocess, []

    def look(self):
        seen.append(self.args.save_only_model)
        make(self)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", look)
    assert not trainer(tmp_path).args.save_only_model and seen == [False]


def train_on_ranks(rank: int, folder, setup: dict, resume) -> tuple[list[float], dict]:
    model = expertmesh.AutoModelForCausalLM.from_pretrained(
        folder.parent / "source", dtype=torch.float32, distributed_setup=setup
    )
    run = trainer(folder, model)
    run.train(resume_from_checkpoint=resume)
    found = losses(run), weights(run)
    dist.barrier()
    return found


def test_two_ranks_with_expert_parallelism_go_on_bit_for_bit_and_so_does_another_layout(tmp_path):
    load_ours("qwen3_moe").save_pretrained(tmp_path / "source")
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    whole = on_ranks(2, train_on_ranks, tmp_path / "whole", {"ep_size": 2}, None)
    resumed = [(tmp_path / "again", {"ep_size": 2}, checkpoint), (tmp_path / "plain", {}, checkpoint)]
    again, plain = on_the_same_ranks(2, train_on_ranks, resumed)
    assert whole[0][0] == again[0][0]
    assert_same(whole[0][1], again[0][1])
    assert whole[0][0] == pytest.approx(plain[0][0], rel=1e-5)
    for name, value in whole[0][1].items():
        torch.testing.assert_close(plain[0][1][name], value, rtol=1e-3, atol=1e-5)


def with_adapter(number: int):
    """A model whose adapter has this number in weights and configuration."""
    model = peft.get_peft_model(load_ours("qwen3_moe"), peft.LoraConfig(target_modules=["q_proj"], lora_alpha=number))
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.constant_(weight, number)
    return model


def adapter_in(folder) -> set[float] | None:
    """The numbers in an adapter's weights and configuration; None where PEFT finds no weights."""
    if not (folder / "adapter_model.safetensors").exists():
        return None
    found = load_file(folder / "adapter_model.safetensors").values()
    return {json.loads((folder / "adapter_config.json").read_text())["lora_alpha"], *(x.mean().item() for x in found)}


@pytest.mark.parametrize("by", ["save_model", "save_final"])
def test_a_kill_at_any_moment_leaves_one_adapter_or_none(by, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    write = peft.peft_model.safe_save_file

    def written(*args, **kwargs):
        write(*args, **kwargs)
        files.sync(tmp_path)  # where `cut_short` may end it: PEFT has written weights, and no configuration

    monkeypatch.setattr(peft.peft_model, "safe_save_file", written)

    def saving(model):
        if by == "save_model":
            return functools.partial(trainer(tmp_path, model).save_model, tmp_path / "final")
        return lambda: save_final(model, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "final")

    (save_old, save_new), seen = map(saving, map(with_adapter, (1, 2))), []
    for operation in range(100):
        save_old()
        (tmp_path / "final" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
        died = cut_short(operation, monkeypatch, save_new, killed=True)
        seen.append(adapter_in(tmp_path / "final"))
        assert seen[-1] in ({1}, {2}, None), operation
        if not died:
            break
    assert {1} in seen and seen[-1] == {2} and len(seen) > 5
    assert "Mine." in (tmp_path / "final" / "README.md").read_text()
