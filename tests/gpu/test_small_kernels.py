"""Norm, RoPE, SwiGLU and loss kernels on a GPU, in bfloat16 at the widths of real models.

Each must be as close to the float32 reference as stock's operations in bfloat16 are (at most 1.5 times their error).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from expertmesh.kernels.activation import Activation, relu2, swiglu
from expertmesh.kernels.clip import scale_, squared_sum
from expertmesh.kernels.grouping import group_by_expert, group_by_expert_reference, unsort
from expertmesh.kernels.rms_norm import (
    add_rms_norm,
    rms_norm,
    rms_norm_reference,
)
from expertmesh.kernels.rope import qk_norm_rope, qk_norm_rope_reference
from expertmesh.kernels.router import router_logits
from tests.kernels.compare import linear_cross_entropy, linear_cross_entropy_reference, outputs_and_grads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


def labels_with_ignored(rows: int, vocab: int) -> torch.Tensor:
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    labels[::3] = -100
    labels[-1] = vocab - 1
    return labels


def cases() -> dict[str, tuple[Callable, Callable, tuple[torch.Tensor, ...]]]:
    """name: (kernel, reference, leaves)."""
    torch.manual_seed(0)
    angle = torch.randn(1, 1024, 128, device="cuda")
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    qkv = leaf(2, 1024, 40 * 128), leaf(128), leaf(128)
    found: dict[str, tuple[Callable, Callable, tuple[torch.Tensor, ...]]] = {}
    for scale in ("rounded", "float32", "one_plus"):
        for width in (2048, 2880, 128):
            found[f"rms_norm {scale} {width}"] = (
                lambda x, w, scale=scale: rms_norm(x, w, 1e-6, scale=scale),
                lambda x, w, scale=scale: rms_norm_reference(x, w, 1e-6, scale=scale),
                (leaf(4, 1023, width), leaf(width)),
            )
    for width in (2048, 7168):
        found[f"add_rms_norm {width}"] = (
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
            lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
            (leaf(4, 1023, width), leaf(4, 1023, width), leaf(width)),
        )
    found["add_rms_norm without a residual 2048"] = (
        lambda x, w: add_rms_norm(x, None, w, 1e-6),
        lambda x, w: (rms_norm_reference(x, w, 1e-6), x),
        (leaf(4, 1023, 2048), leaf(2048)),
    )

    def heads(function: Callable) -> Callable:
        def run(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
            heads = qkv.view(2, 1024, 40, 128)
            rotate = cos.to(qkv.dtype), sin.to(qkv.dtype)
            return function(heads[:, :, :32], heads[:, :, 32:36], q_weight, k_weight, *rotate, 1e-6)

        return run

    found["qk_norm_rope 32+4 heads"] = heads(qk_norm_rope), heads(qk_norm_rope_reference), qkv
    reference = Activation("silu").forward  # of halves
    found["swiglu 6144"] = swiglu, lambda *x: reference(torch.cat(x, dim=-1)), (leaf(4095, 6144), leaf(4095, 6144))
    found["swiglu halves of 1536"] = (
        lambda x: swiglu(*x.chunk(2, dim=-1)),
        reference,
        (leaf(4095, 1536),),
    )
    found["relu2 3712"] = relu2, lambda x: torch.relu(x).square(), (leaf(4095, 3712),)
    for rows, vocab in ((3000, 151936), (5000, 32001)):
        labels = labels_with_ignored(rows, vocab)
        found[f"linear_cross_entropy {vocab}"] = (
            lambda h, w, labels=labels: linear_cross_entropy(h, w, labels, num_items_in_batch=1777),
            lambda h, w, labels=labels: linear_cross_entropy_reference(h, w, labels, num_items_in_batch=1777),
            (leaf(rows, 2048), leaf(vocab, 2048, scale=0.02)),
        )
    return found


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)]


def test_kernels_in_bfloat16_are_as_exact_as_stock():
    for name, (kernel, reference, leaves) in cases().items():
        exact = outputs_and_grads(reference, *(x.detach().float().requires_grad_() for x in leaves))
        ours = relative_errors(outputs_and_grads(kernel, *leaves), exact)
        stock = relative_errors(outputs_and_grads(reference, *leaves), exact)
        assert all(a <= 1.5 * b + 1e-6 for a, b in zip(ours, stock, strict=True)), (name, ours, stock)
        torch.cuda.empty_cache()


def test_kernels_are_deterministic_and_never_make_the_cpu_wait():
    for name, (kernel, _, leaves) in cases().items():
        first = outputs_and_grads(kernel, *leaves)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = outputs_and_grads(kernel, *leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


def test_router_logits_are_those_of_a_float32_product():
    x, weight = leaf(4095, 2688), leaf(128, 2688, scale=0.02)
    exact = outputs_and_grads(lambda x, w: F.linear(x.double(), w.double()).float(), x, weight)
    errors = relative_errors(outputs_and_grads(router_logits, x, weight), exact)
    assert errors[0] < 1e-5 and max(errors[1:]) < 3e-3, errors  # gradients are rounded to bfloat16


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(16384, 8, 128), (4096, 8, 128), (4095, 6, 64), (3000, 10, 512), (70000, 4, 32), (5, 2, 8)],
)
def test_the_counting_sort_equals_a_stable_sort_without_waiting(tokens, top_k, experts):
    torch.manual_seed(0)
    ids = torch.randint(0, experts + 1, (tokens, top_k), device="cuda")  # some are for nobody here
    weight = torch.rand(tokens, top_k, device="cuda").bfloat16()
    parts = torch.randn(3, tokens * top_k, device="cuda")
    unsort(parts, group_by_expert(ids, experts, weight), torch.float32)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = group_by_expert(ids, experts, weight)
        back = unsort(parts, got, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = group_by_expert_reference(ids, experts, weight)
    for name in ("token_S", "position_TK", "bounds", "weight_S"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(back, unsort(parts, want, torch.float32))
    expert, row, used = (x.tolist() for x in got.tiles)
    ends = want.bounds[1:].tolist()
    tiles = [(e, r) for e in range(experts) for r in range(([0] + ends)[e], ends[e], got.block)]
    assert list(zip(expert, row, strict=True))[: used[0]] == tiles


@pytest.mark.parametrize("count", [None, 700, "cpu", "cuda"])
def test_the_loss_takes_every_kind_of_count_without_waiting(count):
    hidden, weight, labels = leaf(1000, 256), leaf(5000, 256), labels_with_ignored(1000, 5000)
    count = torch.tensor(700, device=count) if isinstance(count, str) else count
    expected = linear_cross_entropy_reference(hidden, weight, labels, num_items_in_batch=count)
    linear_cross_entropy(hidden, weight, labels, num_items_in_batch=count).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=count)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_the_loss_in_float16_keeps_gradients_that_scaling_by_the_count_would_flush_to_zero():
    hidden, weight = leaf(4096, 256, dtype=torch.float16), leaf(32000, 256, scale=0.02, dtype=torch.float16)
    labels = torch.randint(0, 32000, (4096,), device="cuda")
    scale = 65536.0  # what a GradScaler starts with
    _, *ours = outputs_and_grads(lambda h, w: linear_cross_entropy(h, w, labels) * scale, hidden, weight)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    _, *expected = outputs_and_grads(lambda h, w: linear_cross_entropy_reference(h, w, labels) * scale, *exact)
    assert max(relative_errors(ours, expected)) < 1e-2


def test_the_loss_never_holds_all_logits():
    rows, vocab = 16384, 151936
    hidden, weight, labels = leaf(rows, 512), leaf(vocab, 512, scale=0.02), labels_with_ignored(rows, vocab)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    kept = 2 * vocab * 512 * 4  # the weight's gradient in float32, twice over
    assert torch.cuda.max_memory_allocated() - before < kept + 1.3 * 2**30 < rows * vocab * 2


def test_clipping_takes_one_pass_that_is_exact_and_never_waits():
    torch.manual_seed(0)
    shapes = (3_000_017,), (64, 129, 257), (2**20,), (1000, 1000), (7,), (0,)
    grads = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in shapes]
    grads += [torch.randn(8, 700, 300, device="cuda", dtype=dtype).transpose(1, 2) for dtype in (torch.float16, None)]
    grads += [torch.randn(2**21, device="cuda")[::2], torch.randn(2**21, device="cuda").bfloat16()[1:]]
    wide = [grad.double() for grad in grads]
    scale, one = torch.tensor(0.37, device="cuda"), torch.ones((), device="cuda")
    squared_sum(grads)  # compiles
    scale_(grads, one)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, again = squared_sum(grads), squared_sum(grads)
        scale_(grads, one)
        same = [grad.clone() for grad in grads]
        scale_(grads, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(total.double(), sum(x.square().sum() for x in wide), rtol=1e-5, atol=0)
    assert torch.equal(total, again)
    for grad, before, exact in zip(grads, same, wide, strict=True):
        assert torch.equal(before.double(), exact)
        if grad.dtype == torch.bfloat16:  # others lie with gaps, or are compared with what is not exact
            assert torch.equal(grad, (exact.float() * scale).to(grad.dtype))
        torch.testing.assert_close(grad.double(), exact * scale.double(), rtol=8e-3, atol=1e-6)
