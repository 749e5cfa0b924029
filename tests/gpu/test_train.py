"""On a GPU: guard and router counts do not hold up the device, and a step that is not finite changes nothing."""

import pytest
import torch
import transformers

from expertmesh.bench.tiny import tiny_model
from expertmesh.fuse import fuse
from expertmesh.train.guard import NonFiniteError
from expertmesh.train.routing import RouterLoad
from expertmesh.train.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() != 1, reason="needs one GPU: with more, one process uses DataParallel"
    ),
]


def model():
    return fuse(tiny_model("qwen3_moe", hidden_size=64)).to("cuda", torch.bfloat16).train()


def test_counting_does_not_wait_for_the_gpu():
    fast = model()
    load, input_ids = RouterLoad(fast), torch.randint(3, 128, (2, 64), device="cuda")
    load.mask = torch.ones_like(input_ids)
    fast(input_ids=input_ids, labels=input_ids).loss.backward()  # kernels are compiled here
    load.window()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(input_ids=input_ids, labels=input_ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    load.window()
    assert load.last is not None and (load.last.sum(1) == 2 * 64 * 2).all()


def test_training_learns_and_a_nan_stops_it_unchanged(tmp_path):
    rows = [{"input_ids": [i % 9 + 3] * 32, "labels": [i % 9 + 3] * 32} for i in range(64)]
    settings = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 5}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = transformers.TrainingArguments(str(tmp_path), **settings, **quiet)
    fast = model()
    trainer = Trainer(model=fast, args=args, train_dataset=rows)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    before = {name: weight.detach().clone() for name, weight in fast.named_parameters()}
    fast.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="the gradient is not finite"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in fast.named_parameters())
