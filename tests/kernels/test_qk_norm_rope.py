"""The q/k-norm + RoPE kernel against its reference, and the reference against Qwen3MoeAttention."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from expertmesh.kernels.rope import qk_norm_rope, qk_norm_rope_reference
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


def rotation(batch: int, seq: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin whose two halves differ, so that taking the wrong half shows."""
    angle = torch.randn(batch, seq, width)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_bit_equal_to_stock_transformers(dtype):
    q_norm, k_norm = Qwen3MoeRMSNorm(24).to(dtype), Qwen3MoeRMSNorm(24).to(dtype)
    torch.nn.init.normal_(q_norm.weight)
    torch.nn.init.normal_(k_norm.weight)
    q, k = torch.randn(2, 5, 6, 24).to(dtype), torch.randn(2, 5, 2, 24).to(dtype)
    cos, sin = (x.to(dtype) for x in rotation(2, 5, 24))
    expected = apply_rotary_pos_emb(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)
    got = qk_norm_rope_reference(q, k, q_norm.weight, k_norm.weight, cos, sin, 1e-6)
    assert all(torch.equal(g, e) and g.stride() == e.stride() for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("batch", "seq", "q_heads", "k_heads", "width", "rotations"),
    [(1, 1, 1, 1, 24, 1), (2, 7, 6, 2, 24, 1), (3, 5, 4, 4, 16, 3), (1, 9, 5, 1, 100, 1), (2, 3, 3, 3, 2, 2)],
)
def test_kernel_equals_reference(batch, seq, q_heads, k_heads, width, rotations):
    leaves = leaf(batch, seq, q_heads, width), leaf(batch, seq, k_heads, width), leaf(width), leaf(width)
    cos, sin = rotation(rotations, seq, width)
    expected = outputs_and_grads(lambda *x: qk_norm_rope_reference(*x, cos, sin, 1e-6), *leaves)
    with on_triton():
        got = outputs_and_grads(lambda *x: qk_norm_rope(*x, cos, sin, 1e-6), *leaves)
    assert_same(got, expected)


def test_strided_inputs_and_gradients_are_read_by_their_strides():
    cos, sin = rotation(1, 12, 48)
    qkv, other, q_weight, k_weight = leaf(2, 5, 8, 24), leaf(6, 5, 2, 24), leaf(24), leaf(48)

    def run(kernel):
        def fn(qkv, other, q_weight, k_weight):
            rotate = cos[:, 2:12:2, 5:29], sin[:, 2:12:2, 5:29]
            fused = kernel(qkv[:, :, :5], qkv[:, :, 5:7], q_weight, k_weight[::2], *rotate, 1e-6)
            spread = kernel(
                other[::3], other.transpose(2, 3).contiguous().transpose(2, 3)[:2], q_weight, q_weight, *rotate, 1e-6
            )
            return *(x.transpose(2, 3) for x in fused), *(x[:, :1].expand(-1, 3, -1, -1) for x in spread)

        return outputs_and_grads(fn, qkv, other, q_weight, k_weight)

    expected = run(qk_norm_rope_reference)
    with on_triton():
        assert_same(run(qk_norm_rope), expected)


def test_outputs_have_the_layout_that_stock_gives_to_attention():
    q, k, weight = torch.randn(2, 7, 6, 24), torch.randn(2, 7, 2, 24), torch.randn(24)
    cos, sin = rotation(1, 7, 24)
    expected = qk_norm_rope_reference(q, k, weight, weight, cos, sin, 1e-6)
    with on_triton():
        got = qk_norm_rope(q, k, weight, weight, cos, sin, 1e-6)
    assert [x.stride() for x in got] == [x.stride() for x in expected]


def test_only_queries_used_leaves_keys_with_zero_gradients():
    leaves = leaf(1, 5, 4, 24), leaf(1, 5, 2, 24), leaf(24), leaf(24)
    cos, sin = rotation(1, 5, 24)
    with on_triton():
        _, dq, dk, dq_weight, dk_weight = outputs_and_grads(lambda *x: qk_norm_rope(*x, cos, sin, 1e-6)[0], *leaves)
    assert dk.count_nonzero() == dk_weight.count_nonzero() == 0
    assert dq.isfinite().all() and dq_weight.count_nonzero() == 24


def test_partial_rotation_and_mismatched_shapes_are_refused():
    q, k, weight = torch.randn(2, 7, 6, 24), torch.randn(2, 7, 2, 24), torch.randn(24)
    cos, sin = rotation(1, 7, 24)
    with pytest.raises(AssertionError, match="cos, sin: "):
        qk_norm_rope(q, k, weight, weight, cos[..., :12], sin[..., :12], 1e-6)
    with pytest.raises(AssertionError):
        qk_norm_rope(q, k[:, :5], weight, weight, cos, sin, 1e-6)
    with pytest.raises(AssertionError):
        qk_norm_rope(q, k, weight, weight, cos[:, :5], sin[:, :5], 1e-6)
