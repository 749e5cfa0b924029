"""On a GPU: weights updated within backward are those of ordinary steps, at less memory, and nothing waits."""

import contextlib
import copy
from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.bench.tiny import tiny_model
from expertmesh.fuse import fuse
from expertmesh.memory import release as module
from expertmesh.train.graphed import GraphedStep

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


def test_whole_steps_are_recorded_if_the_running_norm_keeps_its_place(monkeypatch):
    """Forward, backward and updates in one CUDA graph, whose learning rate is a tensor."""
    monkeypatch.setattr(module, "BYTES", 2**12)
    torch.manual_seed(0)
    model = fuse(tiny_model("qwen3_moe")).cuda().train()
    steps, lr = [], torch.zeros((), device="cuda")
    for each in (model, copy.deepcopy(model)):
        optimizer = expertmesh.AdamW(each.parameters(), lr=lr, max_grad_norm=0.1, states="float32")
        release, running = expertmesh.GradientRelease(optimizer), torch.zeros((), device="cuda")

        def step(ids, each=each, optimizer=optimizer, release=release, running=running):
            loss = release.backward(lambda: each(input_ids=ids, labels=ids).loss)
            optimizer.param_groups[0][module.RUNNING] = running.copy_(optimizer.param_groups[0][module.RUNNING])
            optimizer.step()
            return loss

        steps.append((GraphedStep(each, step), step, each, running))
    (recorded, _, *mine), (_, eager, *others) = steps
    with contextlib.closing(recorded):
        for number, ids in enumerate(torch.randint(3, 128, (8, 2, 16), device="cuda")):
            lr.fill_(1e-3 / (number + 1))
            torch.testing.assert_close(recorded(ids=ids), eager(ids), rtol=1e-3, atol=0)
        assert recorded.replayed == 5
    torch.testing.assert_close(mine[1], others[1], rtol=1e-3, atol=0)
    for (name, a), b in zip(mine[0].named_parameters(), others[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
