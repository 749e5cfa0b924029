"""Recorded steps on GPUs: losses, gradients and counts are those of any other step, and ranks come to an end."""

import contextlib

import pytest
import torch
import transformers

from expertmesh import Trainer
from expertmesh.train.graphed import WARM_UP, GraphedStep
from tests.distributed import work
from tests.distributed.ranks import on_ranks
from tests.distributed.work import Case
from tests.models import load_ours, saved

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
one_gpu = pytest.mark.skipif(torch.cuda.device_count() != 1, reason="with more, one process uses DataParallel")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def gradients(model):
    return {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_replays_compute_what_any_step_does(family, recompute):
    model, other = (load_ours(family).cuda().train() for _ in range(2))
    if recompute:
        model.activation_checkpointing_enable()
    with contextlib.closing(GraphedStep(model)) as step:
        for seed in range(WARM_UP + 3):
            ids = torch.randint(3, 128, (2, 33), generator=torch.Generator().manual_seed(seed)).cuda()
            model.zero_grad()
            other.zero_grad()
            loss = step(input_ids=ids, labels=ids)
            want = other(input_ids=ids, labels=ids).loss
            want.backward()
            torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=0)
            error, name = work.worst(gradients(model), gradients(other))
            assert error <= 1e-3, f"batch {seed}: {name} {error:.1e}"
        assert step.replayed == 3


def trained(folder, cuda_graph):
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * (20 + i % 9) + [0] * (12 - i % 9)}
            for i, ids in enumerate(torch.randint(3, 128, (64, 32), generator=generator).tolist())]  # fmt: skip
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    args = transformers.TrainingArguments(str(folder), **settings, **quiet)
    trainer = Trainer(load_ours("qwen3_moe"), args, train_dataset=rows, eval_dataset=rows[:8], cuda_graph=cuda_graph)
    trainer.train()
    return trainer


@one_gpu
def test_a_recorded_run_logs_what_any_other_does(tmp_path):
    recorded, always = (trained(tmp_path / str(on), on) for on in (True, False))
    for mine, other in zip(recorded.state.log_history, always.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() & {"loss", "grad_norm", "eval_loss", "learning_rate"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key
    loads = recorded.load.total, always.load.total
    assert loads[0].sum() == loads[1].sum() and abs(loads[0] - loads[1]).sum() <= 0.01 * loads[1].sum()


def test_a_step_that_waits_for_the_gpu_is_told_as_such():
    (text,) = on_ranks(1, work.not_recordable, saved("qwen3_moe"), gpus=True)  # apart: it may leave CUDA in disorder
    assert "cannot be recorded" in text and "cuda_graph=False" in text


GATHER = {"ep_size": 2, "dispatch": "gather"}


@two_gpus
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("case", [Case(GATHER), Case(GATHER, recompute=True), Case({})], ids=str)
def test_ranks_replay_what_they_compute_and_come_to_an_end(family, case):
    for rank in on_ranks(2, work.recorded, saved(family), case, gpus=True):  # destroys the group behind it
        for number, (loss, grad, logits) in enumerate(rank):
            assert max(loss, grad, logits) <= 1e-4, f"step {number}: loss {loss:.1e} gradients {grad:.1e}, {logits:.1e}"
