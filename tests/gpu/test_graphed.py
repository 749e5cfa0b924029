"""Recorded steps on GPUs: losses, gradients and counts are those of any other step, and ranks come to an end."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from expertmesh import Trainer
from expertmesh.parallel.setup import recompute
from expertmesh.train import graphed
from expertmesh.train.buckets import bucket_for, one_row, pad_to_bucket, sizes
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


@pytest.mark.parametrize("policy", [False, "experts", True])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_replays_compute_what_any_step_does(family, policy):
    model, other = (load_ours(family).cuda().train() for _ in range(2))
    recompute(model, policy)
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


def padded(examples):
    longest = max(len(example["input_ids"]) for example in examples)
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


packed = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")


class Replays(transformers.TrainerCallback):
    """How many steps were replayed."""

    def on_step_end(self, args, state, control, **_):
        self.count = 0 if self.trainer._graphed is None else self.trainer._graphed.replayed


def trained(folder, cuda_graph, collator=padded, family="qwen3_moe", dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(20, 33, (96,), generator=generator).tolist()
    rows = [{"input_ids": torch.randint(3, 128, (n,), generator=generator).tolist()} for n in lengths]
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    often = {"eval_strategy": "steps", "eval_steps": 5}
    args = transformers.TrainingArguments(str(folder), **settings, **quiet, **often)
    counting = Replays()
    trainer = Trainer(load_ours(family, dtype=dtype), args, collator, rows, rows[:8], cuda_graph=cuda_graph,
                      callbacks=[counting])  # fmt: skip
    counting.trainer = trainer
    trainer.train()
    return trainer, counting.count


@one_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("collator", [padded, packed])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_rows_of_changing_lengths_are_replayed_by_default_and_logged_as_any_other(tmp_path, family, collator, dtype):
    (recorded, replays), (always, none) = (
        trained(tmp_path / str(on), on, collator, family, dtype) for on in ("auto", False)
    )
    assert replays >= 12 - 2 * WARM_UP and not none
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for mine, other in zip(recorded.state.log_history, always.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() & {"loss", "grad_norm", "eval_loss", "learning_rate"}:
            assert mine[key] == pytest.approx(other[key], rel=tolerance), key
    loads = recorded.load.total, always.load.total
    assert loads[0].sum() == loads[1].sum()
    assert dtype != torch.float32 or abs(loads[0] - loads[1]).sum() <= 0.01 * loads[1].sum()


@pytest.mark.parametrize("collator", [padded, packed])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_replayed_buckets_give_the_gradients_of_the_batch_as_it_came(family, collator):
    model, other = (load_ours(family).cuda().train() for _ in range(2))
    buckets = []
    with contextlib.closing(GraphedStep(model)) as step:
        for seed in range(WARM_UP + 4):
            generator = torch.Generator().manual_seed(seed)
            lengths = torch.randint(5, 15, (4,), generator=generator).tolist()
            batch = collator([{"input_ids": torch.randint(3, 128, (n,), generator=generator).tolist()}
                              for n in lengths])  # fmt: skip
            row = one_row(batch)
            bucketed, batch = (
                {key: x.cuda() if torch.is_tensor(x) else x for key, x in inputs.items()}
                for inputs in (pad_to_bucket(row, bucket_for(sizes(row), buckets)), batch)
            )
            model.zero_grad()
            other.zero_grad()
            count = torch.tensor(30 + seed, device="cuda")
            loss = step(**bucketed, num_items_in_batch=count)
            want = other(**batch, num_items_in_batch=count).loss
            want.backward()
            torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=0)
            error, name = work.worst(gradients(model), gradients(other))
            assert error <= 1e-3, f"batch {seed}: {name} {error:.1e}"
        assert step.replayed == 4


def test_shapes_share_the_memory_of_their_gradients_and_none_reads_another_s():
    width = 2048
    model, other = (torch.nn.Linear(width, width, device="cuda") for _ in range(2))
    other.load_state_dict(model.state_dict())

    def run(net, x):
        loss = net(x).square().mean()
        loss.backward()
        return loss

    with contextlib.closing(GraphedStep(model, lambda x: run(model, x))) as step:
        reserved = []
        for number, rows in enumerate([8] * (WARM_UP + 1) + [24] * (WARM_UP + 1) + [8, 24, 8, 8, 24]):
            x = torch.randn(rows, width, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
            model.zero_grad()
            other.zero_grad()
            replayed = step.replayed
            torch.testing.assert_close(step(x=x), run(other, x).detach())
            assert torch.equal(model.weight.grad, other.weight.grad)
            if step.replayed > replayed:  # the gradients of other steps are not of the recordings' memory
                torch.cuda.empty_cache()
                reserved.append(torch.cuda.memory_reserved())
        assert len(reserved) == 7 and max(reserved) - reserved[0] < model.weight.nbytes
        kept = model.weight.grad
    torch.cuda.empty_cache()
    assert model.weight.grad is not kept and torch.equal(model.weight.grad, other.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_memory_that_is_not_owned_is_the_same_memory(dtype):
    x = torch.randn(6, 4, device="cuda").to(dtype)
    for strided in (x, x[1:].T, x[:0]):
        alias = graphed._not_owned(strided)
        assert alias.data_ptr() == strided.data_ptr() and alias.stride() == strided.stride()
        assert alias.dtype == dtype and torch.equal(alias.float(), strided.float())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(x, init_device_mesh("cuda", (1,)), [Shard(0)])
        alias = graphed._not_owned(sharded)
        assert alias.placements == sharded.placements and alias.to_local().data_ptr() == x.data_ptr()
    finally:
        dist.destroy_process_group()


def test_after_a_rehearsal_that_found_a_wait_steps_go_on_with_the_same_numbers():
    model, other = (load_ours("qwen3_moe").cuda().train() for _ in range(2))
    positions = torch.arange(8, device="cuda").repeat(2)[None]  # which the model has to look at
    with contextlib.closing(GraphedStep(model, strict=False)) as step:
        for seed in range(WARM_UP + 2):
            ids = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(seed)).cuda()
            model.zero_grad()
            other.zero_grad()
            loss = step(input_ids=ids, labels=ids, position_ids=positions)
            want = other(input_ids=ids, labels=ids, position_ids=positions).loss
            want.backward()
            torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=0)
            assert work.worst(gradients(model), gradients(other))[0] <= 1e-3
        assert step.gave_up and not step.replayed


def test_a_step_that_waits_for_the_gpu_is_told_as_such():
    (text,) = on_ranks(1, work.not_recordable, saved("qwen3_moe"), gpus=True)
    assert "cannot be recorded" in text and "rows.py, line" in text and "cuda_graph=False" in text


GATHER = {"ep_size": 2, "dispatch": "gather"}


@two_gpus
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("case", [Case(GATHER), Case(GATHER, recompute=True), Case({})], ids=str)
def test_ranks_replay_what_they_compute_and_come_to_an_end(family, case):
    for rank in on_ranks(2, work.recorded, saved(family), case, gpus=True):  # destroys the group behind it
        for number, (loss, grad, logits) in enumerate(rank):
            assert max(loss, grad, logits) <= 1e-4, f"step {number}: loss {loss:.1e} gradients {grad:.1e}, {logits:.1e}"
