"""The gated norm's kernels against Transformers' module."""

import pytest
import torch
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

from expertmesh.kernels import rms_norm
from expertmesh.kernels.rms_norm import launch_backward, launch_forward
from tests.kernels.compare import assert_same, differentiable, leaf, on_triton, outputs_and_grads


def stock(x, gate, weight, groups):
    norm = NemotronHRMSNormGated(len(weight), len(weight) // groups, eps=1e-5)
    return torch.func.functional_call(norm, {"weight": weight}, (x, gate))


def kernels(groups):
    """The kernels as a function of x, gate and weight."""

    def backward(dy, x, gate, weight):
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 2), torch.nan)  # dgate is a slice of something wider
        dx, dweight = launch_backward(x, gate, weight, dy, wide[..., 1:-1], 1e-5, "float32", groups)
        assert wide[..., 0].isnan().all() and wide[..., -1].isnan().all()
        return dx, wide[..., 1:-1], dweight

    def forward(x, gate, weight):
        return launch_forward(x, gate, weight, 1e-5, "float32", groups)[0]

    return differentiable(forward, backward)


@pytest.mark.parametrize(("shape", "groups"), [((2, 37, 96), 4), ((2, 3, 40), 1), ((1, 70, 60), 5)])
def test_the_kernels_equal_stock_transformers(shape, groups, monkeypatch):
    monkeypatch.setitem(rms_norm.GATED_TUNING, "backward", {"elements": 64, "per_thread": 16, "programs": 2})
    wide, gates, weight = leaf(*shape[:-1], shape[-1] + 3), leaf(*shape[:-1], shape[-1] + 5), leaf(shape[-1])

    def run(norm):
        def fn(wide, gates, weight):
            return norm(wide[..., 3:], gates[..., 5:], weight)

        return outputs_and_grads(fn, wide, gates, weight)

    expected = run(lambda x, gate, weight: stock(x, gate, weight, groups))
    with on_triton():
        assert_same(run(kernels(groups)), expected)


def test_no_tokens_give_nothing_and_a_zero_weight_gradient():
    x, gate, weight = leaf(2, 0, 24), leaf(2, 0, 24), leaf(24)
    with on_triton():
        y, dx, dgate, dweight = outputs_and_grads(kernels(3), x, gate, weight)
    assert y.shape == dx.shape == dgate.shape == (2, 0, 24) and not dweight.any()
