"""Attention with sinks on a GPU, in bfloat16: as near to float32 as eager attention is; no waiting; equal bits."""

import warnings

import pytest
import torch

from expertmesh.backends import has_flash_attention
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_bounds, document_of
from expertmesh.kernels.sink_attention import padding_of, sink_attention, sink_attention_reference
from tests.kernels.compare import outputs_and_grads
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def leaves(length: int, heads: int, key_heads: int, width: int, rows: int) -> tuple[torch.Tensor, ...]:
    """[B, N, S, D] over [B, S, N, D] memory, as projections make it, and sinks."""
    torch.manual_seed(0)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads)]
    heads_of = [torch.randn(shape, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]
    return *heads_of, torch.randn(heads, device="cuda").bfloat16().requires_grad_()


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)]


SHAPES = {64: (1024, 16, 2, 2), 128: (777, 4, 1, 2), 32: (300, 2, 1, 1)}  # width: length, heads, key heads, rows
CASES = [
    *((64, window, kind) for window in (None, 128, 600) for kind in ("plain", "packed", "padded")),
    *((128, None, "plain"), (128, 128, "packed"), (32, None, "packed"), (32, 128, "padded")),
]


@pytest.mark.parametrize(("width", "window", "kind"), CASES)
def test_the_kernels_are_as_exact_as_the_reference(width, window, kind, monkeypatch):
    monkeypatch.setattr(flash_attention, "WIDTHS", frozenset())
    length, heads, key_heads, rows = SHAPES[width]
    inputs = leaves(length, heads, key_heads, width, rows)
    documents = padding = seen = None
    if kind == "packed":
        lengths = [n for n in (300, 1, 17, 129) if n < length - 447] or [length // 2]
        cu_seqlens = torch.tensor([0, *lengths, length - sum(lengths), *[length] * (rows - 1)], device="cuda")
        documents = document_bounds(document_of(cu_seqlens.cumsum(0).int(), rows, length))
    if kind == "padded":
        seen = torch.ones(rows, length, dtype=torch.bool, device="cuda")
        seen[0, : length // 3] = seen[-1, length - length // 5 :] = False
        padding = padding_of(seen)

    def reference(query, key, value, sinks):
        start = documents.start if documents is not None else None
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return sink_attention_reference(query, key, value, sinks, width**-0.5, window, start, seen)

    def ours(*x):
        return sink_attention(*x, width**-0.5, window, documents, padding)

    exact = outputs_and_grads(reference, *(x.detach().float().requires_grad_() for x in inputs))
    got = outputs_and_grads(ours, *inputs)
    allowed = relative_errors(outputs_and_grads(reference, *inputs), exact)
    errors = relative_errors(got, exact)
    assert all(a <= 1.5 * b + 1e-3 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)
    again = outputs_and_grads(ours, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_flash_attention("cuda")), reason="needs flash-attn-4 and a Hopper GPU"
)
@pytest.mark.parametrize(
    ("length", "heads", "key_heads", "width"), [(1024, 64, 8, 64), (1091, 16, 2, 64), (1500, 4, 1, 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # of the sinks
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_4_is_as_exact_as_the_reference_and_never_waits(
    length, heads, key_heads, width, packed, dtype, monkeypatch
):
    *inputs, sinks = leaves(length, heads, key_heads, width, 2)
    inputs.append(sinks.detach().to(dtype).requires_grad_())
    ran, kernel = [], flash_attention.flash_attention
    monkeypatch.setattr(flash_attention, "flash_attention", lambda *x: (ran.append(x[-1]), kernel(*x))[1])

    documents = None
    if packed:
        told = torch.tensor([0, 300, 1, length - 301, length], device="cuda").cumsum(0).int()
        documents = document_bounds(document_of(told, 2, length))._replace(given=Documents(told, length))

    def reference(query, key, value, sinks):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        start = documents and documents.start
        return sink_attention_reference(query, key, value, sinks, width**-0.5, start=start)

    def ours(*x):
        return sink_attention(*x, width**-0.5, documents=documents)

    exact = outputs_and_grads(reference, *(x.detach().float().requires_grad_() for x in inputs))
    allowed = relative_errors(outputs_and_grads(reference, *inputs), exact)
    got = outputs_and_grads(ours, *inputs)  # compiles
    errors = relative_errors(got, exact)
    assert ran == [documents and documents.given] and [x.dtype for x in got] == [torch.bfloat16] * 4 + [dtype]
    assert all(a <= 1.5 * b + 2e-3 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = outputs_and_grads(ours, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again[0], got[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "waits"), [("plain", 0), ("told", 0), ("packed", 1), ("padded", 1)])
def test_a_step_of_gpt_oss_waits_once_at_most(kind, waits, autocast):
    """Where neither lengths nor their absence are told, the base model has to look at the device."""
    model = load_ours("gpt_oss", dtype=torch.float32 if autocast else torch.bfloat16).cuda().train()
    lengths = torch.tensor([100, 1, 27])
    ids = torch.randint(3, model.config.vocab_size, (1, 128), device="cuda")
    inputs = {}
    if kind in ("packed", "told"):
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    if kind == "told":
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 100, "max_length_k": 100}
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(128, device="cuda") < 90)[None].long()

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, **inputs).loss
        loss.backward()
        return loss.detach()

    first = step()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again) and first.isfinite()
    found = [warning.filename for warning in caught if "synchronizing" in str(warning.message)]
    assert len(found) == waits and all(name.endswith("rows.py") for name in found), found


def test_compiled_layers_give_the_same_loss():
    eager, compiled = (load_ours("gpt_oss", dtype=torch.bfloat16).cuda().train() for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile()
    ids = torch.randint(3, eager.config.vocab_size, (1, 128), device="cuda")
    losses = [
        model(input_ids=ids, labels=ids, position_ids=torch.arange(128, device="cuda")[None] % 50).loss
        for model in (eager, compiled)
    ]
    losses[1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
