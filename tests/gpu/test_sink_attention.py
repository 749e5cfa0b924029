"""Attention with sinks on a GPU, in 16 bits, by each kernel: as near to float32 as eager attention is; no waiting."""

import warnings

import pytest
import torch

from expertmesh.backends import has_flash_attention
from expertmesh.kernels import flash_attention
from expertmesh.kernels import sink_attention as kernels
from expertmesh.kernels.documents import Documents
from expertmesh.kernels.sink_attention import sink_attention, sink_attention_reference
from tests.kernels.compare import outputs_and_grads
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HAS_FLASH_ATTN_4 = torch.cuda.is_available() and has_flash_attention("cuda")


def leaves(
    length: int, heads: int, key_heads: int, width: int, rows: int, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """[B, N, S, D] over [B, S, N, D] memory, as projections make it, and sinks."""
    torch.manual_seed(0)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads)]
    heads_of = [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    return [*heads_of, torch.randn(heads, device="cuda").to(dtype).requires_grad_()]


def documents_of(length: int, rows: int) -> Documents:
    """Some of them of one token, in rows of which the last is one document."""
    lengths = [300, 1, 17, 129]
    cu_seqlens = torch.tensor([0, *lengths, length - sum(lengths), *[length] * (rows - 1)], device="cuda")
    return Documents(cu_seqlens.cumsum(0).int(), length)


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)]


@pytest.fixture(params=["flash-attn-4", "FlashAttention-2"])
def way(request, monkeypatch) -> list[str]:
    """The kernel that has to run, by its name; and behind it the names of those that ran."""
    if request.param == "FlashAttention-2":
        monkeypatch.setattr(flash_attention, "WIDTHS", frozenset())
    elif not HAS_FLASH_ATTN_4:
        pytest.skip("needs flash-attn-4 and a Hopper GPU")
    names = [request.param]
    for module, name, kernel in (
        (flash_attention, "flash_attention", "flash-attn-4"),
        (kernels, "flash_forward", "FlashAttention-2"),
    ):
        known = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *x, known=known, kernel=kernel, **y: (names.append(kernel), known(*x, **y))[1]
        )
    return names


SHAPES = {  # length, heads, key heads, width, rows
    "gpt-oss": (1091, 16, 2, 64, 2),
    "one row": (1024, 64, 8, 64, 1),
    "wide": (1500, 4, 1, 128, 1),
}
CASES = [
    *(("gpt-oss", window, packed) for window in (None, 1, 128, 600, 5000) for packed in (False, True)),
    *(("one row", window, packed) for window in (None, 128) for packed in (False, True)),
    ("wide", None, True),
    ("wide", 100, False),
]


def compare(inputs: list[torch.Tensor], window: int | None, documents: Documents | None) -> list[torch.Tensor]:
    """What ours gives, which must be about as exact as the reference in the same dtype."""
    scale = inputs[0].shape[-1] ** -0.5

    def reference(*x):
        return sink_attention_reference(*x, scale, window, documents)

    exact = outputs_and_grads(reference, *(x.detach().float().requires_grad_() for x in inputs))
    allowed = relative_errors(outputs_and_grads(reference, *inputs), exact)
    got = outputs_and_grads(lambda *x: sink_attention(*x, scale, window, documents), *inputs)
    errors = relative_errors(got, exact)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs]
    assert all(a <= 1.5 * b + 2e-3 for a, b in zip(errors, allowed, strict=True)), (errors, allowed)
    return got


@pytest.mark.parametrize(("shape", "window", "packed"), CASES)
def test_each_kernel_is_as_exact_as_the_reference_and_never_waits(shape, window, packed, way):
    length, *_, width, rows = SHAPES[shape]
    inputs, documents = leaves(*SHAPES[shape]), documents_of(length, rows) if packed else None
    got = compare(inputs, window, documents)
    assert set(way) == {way[0]} and len(way) == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = outputs_and_grads(lambda *x: sink_attention(*x, width**-0.5, window, documents), *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again[0], got[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_may_be_float32_and_heads_float16(dtype, way):
    *inputs, sinks = leaves(1091, 16, 2, 64, 1, dtype)
    compare([*inputs, sinks.detach().float().requires_grad_()], 128, None)
    assert set(way) == {way[0]}


@pytest.mark.parametrize(("length", "heads", "key_heads", "width"), [(1, 8, 2, 64), (300, 2, 1, 32), (77, 6, 2, 80)])
@pytest.mark.parametrize("window", [None, 20])
def test_short_rows_and_other_widths_run_by_flash_attention_2(length, heads, key_heads, width, window, monkeypatch):
    ran, kernel = [], kernels.flash_forward
    monkeypatch.setattr(kernels, "flash_forward", lambda *x: (ran.append(1), kernel(*x))[1])
    compare(leaves(length, heads, key_heads, width, 3), window, None)
    assert ran == [1]


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_deterministic_algorithms_give_equal_bits(window, packed):
    inputs = leaves(1091, 16, 2, 64, 2)
    documents = documents_of(1091, 2) if packed else None
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (
            outputs_and_grads(lambda *x: sink_attention(*x, 0.125, window, documents), *inputs) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_float32_runs_by_the_reference_and_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(kernels.backends, "warn_once", said.append)
    inputs = [x.detach().float().requires_grad_() for x in leaves(50, 4, 2, 64, 2)]
    got = outputs_and_grads(lambda *x: sink_attention(*x, 0.125, 8), *inputs)
    want = outputs_and_grads(lambda *x: sink_attention_reference(*x, 0.125, 8), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(said) == 1 and "holds all scores" in said[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "waits"), [("plain", 0), ("told", 0), ("packed", 1), ("padded", 1)])
def test_a_step_of_gpt_oss_waits_once_at_most(kind, waits, autocast):
    """Where neither lengths nor their absence are told, the base model has to look at the device."""
    model = load_ours("gpt_oss", dtype=torch.float32 if autocast else torch.bfloat16).cuda().train()
    lengths = torch.tensor([100, 1, 27])
    ids = torch.randint(3, model.config.vocab_size, (1, 128), device="cuda")
    inputs, labels = {}, ids.clone()
    if kind in ("packed", "told"):
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    if kind == "told":
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 100, "max_length_k": 100}
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(128, device="cuda") < 90)[None].long()
        labels[:, 90:] = -100  # as collators have it

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels, **inputs).loss
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
