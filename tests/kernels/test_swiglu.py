"""The SwiGLU kernel against its reference, and the reference against a Transformers MLP's activation."""

import pytest
import torch
from transformers.activations import ACT2FN

from expertmesh.kernels.activation import relu2, swiglu
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_bit_equal_to_stock_transformers(dtype):
    gate, up = torch.randn(2, 5, 96).to(dtype), torch.randn(2, 5, 96).to(dtype)
    assert torch.equal(swiglu(gate, up), ACT2FN["silu"](gate) * up)


@pytest.mark.parametrize("shape", [(1, 24), (7, 100), (2, 3, 96), (3, 2500), (5,), (0, 24)])
def test_kernel_equals_reference(shape):
    gate, up = leaf(*shape, scale=3.0), leaf(*shape)
    if not gate.numel():
        with on_triton():
            assert swiglu(gate, up).shape == shape
        return
    expected = outputs_and_grads(swiglu, gate, up)
    with on_triton():
        assert_same(outputs_and_grads(swiglu, gate, up), expected)


@pytest.mark.parametrize("width", [24, 2500])
def test_halves_of_one_projection_and_transposed_gradients_are_read_by_their_strides(width):
    gate_up = leaf(3, 4, 2 * width)

    def run(kernel):
        def fn(gate_up):
            halves = kernel(gate_up[..., :width], gate_up[..., width:])
            joined = torch.cat((halves, kernel(gate_up[..., ::2], gate_up[:, :, 1::2])), dim=-1)
            return joined, halves.transpose(0, 2)

        return outputs_and_grads(fn, gate_up)

    expected = run(swiglu)
    with on_triton():
        assert_same(run(swiglu), expected)


def test_large_gates_saturate_without_nan():
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0]], requires_grad=True)
    up = torch.ones(1, 4, requires_grad=True)
    expected = outputs_and_grads(swiglu, gate, up)
    with on_triton():
        assert_same(outputs_and_grads(swiglu, gate, up), expected)


def test_different_shapes_or_dtypes_are_refused():
    with pytest.raises(AssertionError):
        swiglu(torch.randn(2, 8), torch.randn(1, 8))
    with pytest.raises(AssertionError):
        swiglu(torch.randn(2, 8), torch.randn(2, 8).bfloat16())


@pytest.mark.parametrize("shape", [(2, 3, 96), (3, 2500), (0, 24)])
def test_relu2_is_bit_equal_to_stock_transformers(shape):
    wide = leaf(*shape[:-1], shape[-1] + 8)

    def run(fn):
        return outputs_and_grads(lambda wide: fn(wide[..., 8:]), wide)

    expected = run(ACT2FN["relu2"])
    with on_triton():
        got = run(relu2)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    x = torch.tensor([-1.0, 0.0, 2.0, torch.nan, -torch.inf])
    with on_triton():
        assert torch.equal(relu2(x).isnan(), x.isnan()) and relu2(x)[4] == 0
