"""Mamba2 on a GPU, in bfloat16 at the widths of real models: near to float32, deterministic, and never waiting."""

import pytest
import torch

from expertmesh.kernels.documents import document_starts
from expertmesh.kernels.mamba2 import Mamba2Options, Mamba2Weights, mamba2, mamba2_reference
from tests.kernels.compare import outputs_and_grads
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HEADS, WIDTH, GROUPS, STATE, LENGTH = 16, 64, 2, 128, 1000
KINDS = ["plain", "packed", "padded"]


def leaf(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale + shift).bfloat16().requires_grad_()


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    inner, channels = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATE
    A = -torch.arange(1, HEADS + 1, device="cuda", dtype=torch.float32)
    conv = leaf(channels, 4, scale=0.3), leaf(channels, scale=0.3)
    small = A.requires_grad_(), leaf(HEADS), leaf(HEADS, shift=-4)
    return [leaf(2, LENGTH, inner + channels + HEADS), *conv, *small, leaf(inner, scale=0.1, shift=1)]


def runner(kind: str, fn):
    token = torch.arange(LENGTH, device="cuda")
    firsts = torch.tensor([[100, 101, 512, 700], [5, 640, 900, 999]], device="cuda")
    start = document_starts((token[None, :, None] >= firsts[:, None]).sum(2)) if kind == "packed" else None
    mask = (token < torch.tensor([[LENGTH], [333]], device="cuda")).long() if kind == "padded" else None
    options = Mamba2Options(WIDTH, GROUPS, (0.001, float("inf")), 1e-5)
    return lambda projected, *weights: fn(projected, Mamba2Weights(*weights), options, start, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_all_gradients_are_near_to_float32(kind):
    leaves = inputs()
    exact = outputs_and_grads(runner(kind, mamba2_reference), *(x.detach().float().requires_grad_() for x in leaves))
    got = outputs_and_grads(runner(kind, mamba2), *leaves)
    errors = [float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)]
    a_log = errors.pop(4)  # the gradient of A is a small difference of large sums: rounding shows twenty times as much
    assert max(errors) < 1e-2 and a_log < 0.1, (errors, a_log)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_deterministic_and_never_makes_the_cpu_wait(kind):
    leaves, run = inputs(), runner(kind, mamba2)
    first = outputs_and_grads(run, *leaves)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = outputs_and_grads(run, *leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_on_packed_documents_never_waits_and_runs_no_code_of_stock(autocast, monkeypatch):
    model = load_ours("nemotron_h", dtype=torch.float32 if autocast else torch.bfloat16).cuda().train()
    mixer = model.model.layers[0].mixer
    monkeypatch.setattr(type(mixer).__stock__, "forward", lambda *args, **kwargs: pytest.fail("stock's mixer ran"))
    lengths = torch.tensor([100, 1, 27])
    ids = torch.randint(3, model.config.vocab_size, (1, 128), device="cuda")
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 100, "max_length_k": 100,
    }  # fmt: skip

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, **packed).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    first = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in second) and torch.equal(first[0], second[0])
