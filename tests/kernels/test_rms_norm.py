"""RMSNorm kernels against their reference, and the reference against Transformers."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from expertmesh.kernels.rms_norm import (
    add_rms_norm,
    rms_norm,
    rms_norm_reference,
    sum_partials,
)
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


def add_rms_norm_reference(x, residual, weight, eps, *, scale="rounded"):
    """A decoder layer's residual add, then the norm."""
    total = x if residual is None else residual + x
    return rms_norm_reference(total, weight, eps, scale=scale), total


SCALES = ["rounded", "float32", "one_plus"]
STOCK = [
    (Qwen3MoeRMSNorm, "rounded"),
    (NemotronHRMSNorm, "float32"),
    (GptOssRMSNorm, "float32"),
    (GemmaRMSNorm, "one_plus"),
    (Qwen3NextRMSNorm, "one_plus"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stock_class", "scale"), STOCK)
def test_the_reference_is_bit_equal_to_stock_transformers(stock_class, scale, dtype):
    stock = stock_class(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(stock.weight)
    x = torch.randn(2, 5, 96).to(dtype)
    assert torch.equal(rms_norm_reference(x, stock.weight, 1e-5, scale=scale), stock(x))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(1, 24), (7, 100), (2, 3, 96), (300, 33), (2, 3000), (5, 3)])
def test_rms_norm_kernel_equals_reference(shape, scale):
    x, weight = leaf(*shape), leaf(shape[-1])
    expected = outputs_and_grads(lambda x, w: rms_norm_reference(x, w, 1e-6, scale=scale), x, weight)
    with on_triton():
        got = outputs_and_grads(lambda x, w: rms_norm(x, w, 1e-6, scale=scale), x, weight)
    assert_same(got, expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(1, 24), (7, 100), (2, 3, 96), (300, 33)])
def test_add_rms_norm_kernel_equals_reference(shape, scale):
    x, residual, weight = leaf(*shape), leaf(*shape), leaf(shape[-1])
    expected = outputs_and_grads(
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6, scale=scale), x, residual, weight
    )
    with on_triton():
        got = outputs_and_grads(lambda x, r, w: add_rms_norm(x, r, w, 1e-6, scale=scale), x, residual, weight)
    assert_same(got, expected)


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2), slice(0, 2)])
@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 24), "one_plus"), ((7, 100), "float32"), ((2, 3, 96), "rounded"), ((300, 33), "rounded")]
)
def test_add_rms_norm_without_a_residual_adds_the_gradients_of_both_uses(shape, used, scale):
    wide, weight = leaf(*shape[:-1], 2 * shape[-1]), leaf(shape[-1])

    def run(norm):
        def fn(wide, weight):
            half = wide[..., : shape[-1]]
            return torch.cat([*norm(half, None, weight, 1e-6, scale=scale)[used], 0 * (half + weight)], dim=-1)

        return outputs_and_grads(fn, wide, weight)

    expected = run(add_rms_norm_reference)
    with on_triton():
        assert_same(run(add_rms_norm), expected)


@pytest.mark.parametrize(("rows", "split", "width"), [(1, 1, 3), (7, 2, 40), (200, 130, 33)])
def test_partial_sums_of_two_parts_are_rounded_once(rows, split, width):
    partial, first, second = torch.randn(rows, width), torch.empty(width), torch.empty(width).bfloat16()
    with on_triton():
        sum_partials(partial, split, first)
        assert_same([first], [partial[:split].sum(0)])
        first = first.bfloat16()
        sum_partials(partial, split, first, second)
    assert_same([first, second], [x.sum(0).bfloat16() for x in (partial[:split], partial[split:])], tolerance=8e-3)


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_gives_gradients_when_only_one_output_is_used(used):
    leaves = leaf(7, 24), leaf(7, 24)
    weight = torch.randn(24)
    expected = outputs_and_grads(lambda x, r: add_rms_norm_reference(x, r, weight, 1e-6)[used], *leaves)
    with on_triton():
        got = outputs_and_grads(lambda x, r: add_rms_norm(x, r, weight, 1e-6)[used], *leaves)
    assert_same(got, expected)


def test_inputs_and_gradients_that_are_views_of_wider_rows_are_read_by_their_strides():
    wide, wider, weight = leaf(7, 48), leaf(7, 72), leaf(24)

    def run(norm):
        def fn(wide, wider, weight):
            return torch.cat(norm(wide[:, 24:], wider[:, 24:48], weight, 1e-6), dim=-1)

        return outputs_and_grads(fn, wide, wider, weight)

    expected = run(add_rms_norm_reference)
    with on_triton():
        assert_same(run(add_rms_norm), expected)


def test_strided_inputs_and_gradients_are_read_by_their_strides():
    x, residual, weight = leaf(4, 6, 48), leaf(6, 4, 24), leaf(24)

    def run(norm):
        def fn(x, residual, weight):
            y, total = norm(x[:, :, ::2], residual.transpose(0, 1), weight, 1e-6)
            return y.transpose(1, 2), total.transpose(0, 1), norm(x[:, 1:3, 24:], x[:, 3:5, :24], weight, 1e-6)[0]

        return outputs_and_grads(fn, x, residual, weight)

    expected = run(add_rms_norm_reference)
    with on_triton():
        assert_same(run(add_rms_norm), expected)


def test_a_frozen_weight_gets_no_gradient_and_the_input_still_does():
    x, weight = leaf(7, 24), torch.randn(24)
    expected = outputs_and_grads(lambda x: rms_norm_reference(x, weight, 1e-6), x)
    with on_triton():
        assert_same(outputs_and_grads(lambda x: rms_norm(x, weight, 1e-6), x), expected)


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "weight_dtype"), [("bf16", "fp32", "bf16"), ("bf16", "bf16", "fp32")]
)
def test_mixed_dtypes_promote_as_in_pytorch(x_dtype, residual_dtype, weight_dtype):
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    x, residual = torch.randn(7, 24).to(names[x_dtype]), torch.randn(7, 24).to(names[residual_dtype])
    weight = torch.randn(24).to(names[weight_dtype])
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    expected = outputs_and_grads(lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6), *leaves)
    with on_triton():
        got = outputs_and_grads(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), *leaves)
    assert_same(got, expected, tolerance=2e-2)


def test_no_rows_give_an_empty_output_and_a_zero_weight_gradient():
    x, weight = leaf(0, 24), leaf(24)
    with on_triton():
        y, dx, dweight = outputs_and_grads(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    assert y.shape == dx.shape == (0, 24)
    assert torch.equal(dweight, torch.zeros(24))


def test_wrong_shapes_and_scales_are_refused():
    with pytest.raises(AssertionError, match="the width of x"):
        rms_norm(torch.randn(2, 8), torch.randn(1), 1e-6)
    with pytest.raises(AssertionError):
        rms_norm(torch.randn(2, 8), torch.randn(8), 1e-6, scale="bf16")  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        add_rms_norm(torch.randn(2, 8), torch.randn(1, 8), torch.randn(8), 1e-6)
