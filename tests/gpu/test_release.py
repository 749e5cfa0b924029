"""On a GPU: weights updated within backward are those of ordinary steps, at less memory, and nothing waits."""

import copy
from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.bench.tiny import tiny_model
from expertmesh.fuse import fuse
from expertmesh.memory import release as module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WARM_UP, STEPS = 2, 5


def peak(model: Any, clipping: Any) -> int:
    """Bytes above the weights at the peak of the last steps, which must not wait for the device."""
    optimizer = expertmesh.AdamW(model.parameters(), lr=1e-3, max_grad_norm=0.1 if clipping else None)
    release = expertmesh.GradientRelease(optimizer, clipping) if clipping else None
    batches = torch.randint(3, 128, (STEPS, 1, 8), generator=torch.Generator().manual_seed(1)).cuda()
    try:
        for step, ids in enumerate(batches):
            if step == WARM_UP:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_sync_debug_mode("error")
            if release is None:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.clip_next(expertmesh.clip_grad_norm(model.parameters(), float("inf")), 0.1)
            else:
                release.backward(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def test_weights_are_those_of_ordinary_steps_and_gradients_do_not_stand(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 2**18)
    torch.manual_seed(0)
    ordinary = fuse(tiny_model("qwen3_moe", hidden_size=256, num_hidden_layers=8)).cuda().train()
    models = {"exact": copy.deepcopy(ordinary), "running": copy.deepcopy(ordinary)}
    most = peak(ordinary, None)
    gradients = sum(p.nbytes for p in ordinary.parameters())
    for clipping, model in models.items():
        assert peak(model, clipping) < most - gradients / 2, clipping
    for (name, a), b in zip(models["exact"].named_parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
