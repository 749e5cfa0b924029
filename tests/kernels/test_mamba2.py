"""What Mamba2 does between its projections: the kernels in one autograd function against their references."""

import pytest
import torch

from expertmesh.kernels.documents import document_starts
from expertmesh.kernels.mamba2 import Mamba2Options, Mamba2Weights, mamba2, mamba2_reference
from expertmesh.kernels.ssd import TUNING
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads

HEADS, WIDTH, GROUPS, STATE = 4, 16, 2, 16
OPTIONS = Mamba2Options(WIDTH, GROUPS, (0.05, 1.5), 1e-5)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(TUNING, "chunk", 32)
    for kernel in ("states", "outputs", "inputs", "gradients"):
        monkeypatch.setitem(TUNING, kernel, {"BLOCK": 16, "num_warps": 4, "num_stages": 1})


def run(fn, leaves, bias, start, mask):
    def of_leaves(projected, *weights):
        weights = list(weights)
        if not bias:
            weights.insert(1, None)
        return fn(projected, Mamba2Weights(*weights), OPTIONS, start, mask)

    return outputs_and_grads(of_leaves, *leaves)


def inputs(B, S, bias=True):
    inner, channels = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATE
    A = (-torch.rand(HEADS)).requires_grad_()
    small = [leaf(channels)] if bias else []
    return [leaf(B, S, inner + channels + HEADS), leaf(channels, 4), *small, A, leaf(HEADS), leaf(HEADS), leaf(inner)]


@pytest.mark.parametrize(("kind", "bias"), [("plain", False), ("packed", True), ("padded", True)])
def test_the_kernels_equal_the_references(kind, bias):
    start = document_starts((torch.arange(45) >= torch.tensor([[7], [40]])).int()) if kind == "packed" else None
    mask = (torch.arange(45) < torch.tensor([[45], [31]])).long() if kind == "padded" else None
    leaves = inputs(2, 45, bias)
    expected = run(mamba2_reference, leaves, bias, start, mask)
    with on_triton():
        assert_same(run(mamba2, leaves, bias, start, mask), expected, tolerance=2e-5)


def test_only_the_projection_and_the_scans_output_are_kept():
    leaves, kept = inputs(1, 40), []
    with on_triton(), torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        run(mamba2, leaves, True, None, None)
    wide = sum(x.numel() for x in kept if x.dim() == 3)
    assert wide == leaves[0].numel() + 40 * HEADS * WIDTH


def test_no_tokens_give_nothing():
    leaves = inputs(2, 0)
    with on_triton():
        y = mamba2(leaves[0], Mamba2Weights(*leaves[1:]), OPTIONS)
    assert y.shape == (2, 0, HEADS * WIDTH)
