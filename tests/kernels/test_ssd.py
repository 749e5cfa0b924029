"""Mamba2's scan: the kernels against Transformers' function of each document.

The kernels multiply decays as powers of two of differences of sums, where the reference adds up one exponent after the
other: in float32 the two differ by the rounding of a sum of up to a chunk's exponents, so the tolerance is 2e-5 and
not that of a single product.
"""

import pytest
import torch

from expertmesh.kernels.documents import document_starts, per_document
from expertmesh.kernels.mamba2 import scan_reference
from expertmesh.kernels.ssd import TUNING, Sizes, split, ssd_forward
from expertmesh.kernels.ssd_backward import ssd_backward
from tests.kernels.compare import assert_same, differentiable, leaf, on_triton, outputs_and_grads

LIMIT = 0.05, 1.5


def parts(B: int, S: int, H: int, P: int, G: int, N: int) -> list[torch.Tensor]:
    """x, dt, A, B, C, D, dt_bias; part of dt is outside LIMIT, some heads forget fast and some slowly."""
    A = (-torch.rand(H) * torch.logspace(-2, 0.5, H)).requires_grad_()
    return [
        leaf(B, S, H, P), leaf(B, S, H, scale=2.0), A, leaf(B, S, G, N), leaf(B, S, G, N), leaf(H), leaf(H)
    ]  # fmt: skip


def documents(S: int, *rows: tuple[int, ...]) -> torch.Tensor:
    seq_idx = torch.zeros(len(rows), S, dtype=torch.int32)
    for row, firsts in enumerate(rows):
        for first in firsts:
            seq_idx[row, first:] += 1
    return document_starts(seq_idx)


def compare(B, S, H, P, G, N, start=None, block=16):
    x, dt, A, Bm, C, D, bias = parts(B, S, H, P, G, N)
    xbc = torch.cat([t.detach().flatten(2) for t in (x, Bm, C)], -1)
    # what the projection leaves: slices of something wider
    wide = torch.cat([torch.randn(B, S, 3), xbc, dt.detach()], -1).requires_grad_()
    width = xbc.shape[-1]

    def run(fn):
        def sliced(wide, *small):
            return fn(wide[..., 3 : 3 + width], wide[..., 3 + width :], *small)

        return outputs_and_grads(sliced, wide, A, D, bias)

    sizes = Sizes(B, S, H, P, G, N)
    expected = run(lambda *a: reference(sizes, start, *a))
    with on_triton():
        got = run(kernels(sizes, start))
    assert_same(got, expected, tolerance=2e-5)


def reference(sizes, start, xbc, dt, A, D, bias):
    """Transformers' function of each document by itself."""
    start = torch.zeros(dt.shape[:2], dtype=torch.int32) if start is None else start

    def alone(xbc, dt):
        x, B, C = split(xbc, sizes)
        return scan_reference(x, dt, A, B, C, 64, D, bias, dt_softplus=True, dt_limit=LIMIT).flatten(2)

    return per_document(alone, start, xbc, dt)


def kernels(sizes, start):
    """The kernels as a function of xbc, dt, A, D and dt_bias."""

    def backward(dy, xbc, dt, A, D, bias):
        dxbc, ddt = torch.empty_like(xbc, memory_format=torch.contiguous_format), torch.empty(dt.shape)
        dA, dbias, dD = ssd_backward(xbc, dt, A, D, bias, start, sizes, LIMIT, dy, dxbc, ddt)
        return dxbc, ddt, dA, dD, dbias

    return differentiable(lambda xbc, dt, A, D, bias: ssd_forward(xbc, dt, A, D, bias, start, sizes, LIMIT), backward)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(TUNING, "chunk", 32)
    for kernel in ("states", "outputs", "inputs", "gradients"):
        monkeypatch.setitem(TUNING, kernel, {"BLOCK": 16, "num_warps": 4, "num_stages": 1})
    for kernel in ("prepare", "finish"):
        monkeypatch.setitem(TUNING, kernel, {"HEADS": 2, "num_warps": 4})


@pytest.mark.parametrize("S", [2, 32, 75])
def test_the_kernels_equal_the_reference(S, small_tiles):
    compare(2, S, 4, 32, 2, 16)


def test_the_kernels_equal_the_reference_with_whole_chunks_as_tiles(small_tiles):
    for kernel in ("states", "outputs", "inputs", "gradients"):
        TUNING[kernel]["BLOCK"] = 32
    compare(1, 70, 3, 16, 1, 32)


@pytest.mark.parametrize(
    "rows",
    [
        ((40,), ()),  # inside a chunk, and none
        ((32, 64), (31, 33, 65)),  # at the chunks' borders and beside them
        ((1, 2, 3, 50, 51), (74,)),  # several in one chunk, and the last token alone
    ],
)
def test_packed_documents_do_not_see_each_other(rows, small_tiles):
    compare(2, 75, 2, 16, 1, 16, start=documents(75, *rows))


def test_the_shipped_tiles_at_one_and_a_half_chunks():
    compare(1, 190, 2, 64, 1, 128, start=documents(190, (100, 150)))
