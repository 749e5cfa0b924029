"""The causal convolution's kernels against Transformers' function of each document."""

import pytest
import torch

from expertmesh.kernels import causal_conv as conv
from expertmesh.kernels.causal_conv import conv_backward, conv_forward
from expertmesh.kernels.documents import document_starts, per_document
from expertmesh.kernels.mamba2 import conv_reference
from tests.kernels.compare import assert_same, differentiable, leaf, on_triton, outputs_and_grads


def kernels(start):
    """The kernels as a function of x, weight and, if there is one, bias."""

    def backward(dy, x, weight, bias=None):
        wide = torch.full((*x.shape[:2], x.shape[2] + 2), torch.nan)  # dx is a slice of something wider
        dweight, dbias = conv_backward(x, weight, bias, start, dy, wide[..., 1:-1])
        assert wide[..., 0].isnan().all() and wide[..., -1].isnan().all()
        return wide[..., 1:-1], dweight, dbias

    def both(x, weight, *bias):
        gradients = differentiable(
            lambda x, weight, bias=None: conv_forward(x, weight, bias, start),
            lambda *a: backward(*a)[: 2 + len(bias)],
        )
        return gradients(x, weight, *bias)

    return both


def starts(B: int, S: int, *firsts: int) -> torch.Tensor:
    """Documents that start at 0 and at these tokens; the second row has one document more."""
    seq_idx = torch.zeros(B, S, dtype=torch.int32)
    for first in firsts:
        seq_idx[:, first:] += 1
    seq_idx[1:, S // 2 :] += 1
    return document_starts(seq_idx)


def reference(x, weight, bias=None, start=None):
    """Transformers' function of each document by itself."""
    start = torch.zeros(x.shape[:2], dtype=torch.int32) if start is None else start
    return per_document(lambda x: conv_reference(x.transpose(1, 2), weight, bias, "silu").transpose(1, 2), start, x)


@pytest.mark.parametrize(
    ("S", "C", "bias", "documents"),
    [
        (37, 40, True, None),
        (33, 70, True, (3, 4, 6, 21)),
        (64, 32, False, (3, 4, 6, 21)),
        (16, 5, False, None),
    ],
)
def test_the_kernels_equal_the_reference(S, C, bias, documents, monkeypatch):
    for direction in ("forward", "backward"):
        monkeypatch.setitem(conv.TUNING, direction, {"rows": 16, "channels": 32, "num_warps": 1})
    start = starts(2, S, *(d for d in documents if d < S)) if documents else None
    wide, weight, *rest = leaf(2, S, C + 3), leaf(C, 4), *([leaf(C)] if bias else [])

    def run(fn):
        def sliced(wide, weight, bias=None):
            return fn(wide[..., 2 : 2 + C], weight, *([] if bias is None else [bias]))

        return outputs_and_grads(sliced, wide, weight, *rest)

    expected = run(lambda x, weight, bias=None: reference(x, weight, bias, start))
    with on_triton():
        assert_same(run(kernels(start)), expected)


def test_one_token():
    leaves = leaf(2, 1, 8), leaf(8, 4), leaf(8)
    expected = outputs_and_grads(reference, *leaves)
    with on_triton():
        assert_same(outputs_and_grads(kernels(None), *leaves), expected)
