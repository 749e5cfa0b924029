"""Packed documents on a GPU, in bfloat16: as near to float32, document by document, as SDPA with a mask; no waiting."""

import pytest
import torch
from torch.nn import functional as F

from expertmesh.backends import has_flash_attention
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_mask, varlen_attention
from expertmesh.layers import attention
from tests.kernels.compare import outputs_and_grads
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def leaf(rows: int, heads: int, length: int, width: int) -> torch.Tensor:
    """[B, N, S, D] over [B, S, N, D] memory, as projections make it."""
    return torch.randn(rows, length, heads, width, device="cuda").bfloat16().transpose(1, 2).requires_grad_()


def causal(query, key, value):
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2)


def with_mask(query, key, value, cu_seqlens):
    mask = document_mask(cu_seqlens, query.shape[0], query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)]


@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "width", "value_width"),
    [(1, 32, 4, 128, 128), (2, 8, 8, 64, 64), (2, 4, 1, 64, 64), (1, 16, 16, 192, 128), (1, 4, 2, 8, 8)],
)
def test_packed_documents_are_as_exact_as_with_a_mask(rows, heads, key_heads, width, value_width):
    torch.manual_seed(0)
    length = 1024
    lengths = [300, 1, 17, 512, 194, *[length] * (rows - 1)]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    leaves = (
        leaf(rows, heads, length, width),
        leaf(rows, key_heads, length, width),
        leaf(rows, key_heads, length, value_width),
    )
    exact = outputs_and_grads(
        lambda *x: with_mask(*x, cu_seqlens), *(x.detach().float().requires_grad_() for x in leaves)
    )
    ours = outputs_and_grads(lambda *x: varlen_attention(*x, cu_seqlens, max(lengths)), *leaves)
    stock = outputs_and_grads(lambda *x: with_mask(*x, cu_seqlens), *leaves)
    errors, allowed = relative_errors(ours, exact), relative_errors(stock, exact)
    assert all(a <= 1.5 * b + 1e-6 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_on_packed_documents_never_waits_when_the_collator_says_where_they_begin(autocast, monkeypatch):
    ran = []
    kernel = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *args: (ran.append(args[4]), kernel(*args))[1])
    model = load_ours("qwen3_moe", dtype=torch.float32 if autocast else torch.bfloat16).cuda().train()
    lengths = torch.tensor([100, 1, 27])
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    ids = torch.randint(3, model.config.vocab_size, (1, 128), device="cuda")
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
    said = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 100, "max_length_k": 100}

    def step(**more):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False, **more).loss
        loss.backward()
        return loss.detach()

    looked = step()  # compiles, and finds the documents itself: with one wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        told = step(**said)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ran == [100] * (2 * model.config.num_hidden_layers)
    torch.testing.assert_close(told, looked, rtol=1e-3, atol=0)


needs_flash_attention_4 = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_flash_attention("cuda")), reason="needs flash-attn-4 and a Hopper GPU"
)


def flash_leaves(rows: int, heads: int, key_heads: int, width: int, value_width: int, length: int):
    """Values are views with gaps, as those of latent attention are."""
    torch.manual_seed(0)
    wide = torch.randn(rows, length, key_heads, width + value_width, device="cuda").bfloat16()
    value = wide[..., width:].transpose(1, 2).requires_grad_()
    return leaf(rows, heads, length, width), leaf(rows, key_heads, length, width), value


@needs_flash_attention_4
@pytest.mark.parametrize("length", [1024, 1091])
@pytest.mark.parametrize(
    "sizes", [(1, 32, 4, 128, 128), (2, 32, 2, 128, 128), (2, 8, 8, 64, 64), (1, 16, 16, 192, 128)], ids=str
)
def test_flash_attention_4_is_as_exact_as_sdpa(sizes, length):
    leaves = flash_leaves(*sizes, length)
    assert flash_attention.supports(*leaves)
    exact = outputs_and_grads(causal, *(x.detach().float().requires_grad_() for x in leaves))
    errors = relative_errors(outputs_and_grads(flash_attention.flash_attention, *leaves), exact)
    allowed = relative_errors(outputs_and_grads(causal, *leaves), exact)
    assert all(a <= 1.5 * b + 1e-3 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)


@needs_flash_attention_4
@pytest.mark.parametrize("sizes", [(1, 32, 4, 128, 128), (2, 8, 8, 64, 64), (1, 16, 16, 192, 128)], ids=str)
def test_flash_attention_4_keeps_packed_documents_apart_and_never_waits(sizes):
    lengths = [300, 1, 17, 512, 194, *[1024] * (sizes[0] - 1)]
    documents = Documents(torch.tensor([0, *lengths], device="cuda").cumsum(0).int(), max(lengths))
    leaves = flash_leaves(*sizes, 1024)
    assert flash_attention.supports(*leaves)

    def packed(*x):
        return flash_attention.flash_attention(*x, documents=documents)

    outputs_and_grads(packed, *leaves)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = outputs_and_grads(packed, *leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = (x.detach().float().requires_grad_() for x in leaves)
    exact = outputs_and_grads(lambda *x: with_mask(*x, documents.cu_seqlens), *exact)
    allowed = relative_errors(outputs_and_grads(lambda *x: with_mask(*x, documents.cu_seqlens), *leaves), exact)
    errors = relative_errors(ours, exact)
    assert all(a <= 1.5 * b + 1e-3 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)


@needs_flash_attention_4
def test_flash_attention_4_can_be_recorded():
    leaves = flash_leaves(1, 32, 4, 128, 128, 1024)
    dout = torch.randn(1, 1024, 32, 128, device="cuda").bfloat16()

    def step():
        out = flash_attention.flash_attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    fresh = step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    assert all(error < 2e-3 for error in relative_errors(recorded, fresh))
