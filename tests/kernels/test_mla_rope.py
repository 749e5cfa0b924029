"""The kernel between MLA's projections and its attention against its reference, and the reference against stock."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from expertmesh.kernels.mla_rope import mla_rope, mla_rope_reference
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


def rotation(batch: int, seq: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin whose two halves differ, so that taking the wrong half shows."""
    angle = torch.randn(batch, seq, width)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_bit_equal_to_stock_transformers(dtype):
    q, kv, k_rope = (torch.randn(2, 5, *shape).to(dtype) for shape in ((3, 24), (3, 28), (8,)))
    cos, sin = (x.to(dtype) for x in rotation(2, 5, 8))
    q_rope, k_turned = apply_rotary_pos_emb_interleave(q.transpose(1, 2)[..., 16:], k_rope[:, None], cos, sin)
    query, key, value = mla_rope_reference(q, kv, k_rope, cos, sin)
    assert torch.equal(query, torch.cat([q.transpose(1, 2)[..., :16], q_rope], dim=-1))
    assert torch.equal(key, torch.cat([kv.transpose(1, 2)[..., :16], k_turned.expand(-1, 3, -1, -1)], dim=-1))
    assert torch.equal(value, kv.transpose(1, 2)[..., 16:])


@pytest.mark.parametrize(
    ("batch", "seq", "heads", "nope", "rope", "value", "rotations"),
    [(1, 1, 1, 16, 8, 16, 1), (2, 5, 3, 16, 8, 12, 1), (2, 3, 20, 24, 12, 24, 2), (1, 2, 33, 4, 2, 7, 1)],
)
def test_kernel_equals_reference(batch, seq, heads, nope, rope, value, rotations):
    leaves = leaf(batch, seq, heads, nope + rope), leaf(batch, seq, heads, nope + value), leaf(batch, seq, rope)
    turn = rotation(rotations, seq, rope)
    expected = outputs_and_grads(lambda *x: mla_rope_reference(*x, *turn), *leaves)
    with on_triton():
        got = outputs_and_grads(lambda *x: mla_rope(*x, *turn), *leaves)
    assert_same(got, expected)


def test_strided_inputs_and_gradients_are_read_by_their_strides():
    cos, sin = rotation(1, 10, 24)
    fused, latent = leaf(2, 5, 6, 52), leaf(2, 5, 20)

    def run(kernel):
        def fn(fused, latent):
            turn = cos[:, ::2, 3:11], sin[:, ::2, 3:11]
            query, key, value = kernel(fused[:, :, ::2, :24], fused[:, :, 1::2, 24:], latent[..., 12:], *turn)
            last_strided = kernel(
                fused.transpose(2, 3).contiguous().transpose(2, 3)[..., :24], fused[..., 24:], latent[..., :8], *turn
            )
            return query.transpose(2, 3), key[:, :1].expand(-1, 3, -1, -1), value.flatten(1), *last_strided

        return outputs_and_grads(fn, fused, latent)

    expected = run(mla_rope_reference)
    with on_triton():
        assert_same(run(mla_rope), expected)


def test_queries_and_keys_lie_token_by_token_and_values_are_not_copied():
    q, kv, k_rope = torch.randn(2, 5, 3, 24), torch.randn(2, 5, 3, 28), torch.randn(2, 5, 8)
    with on_triton():
        query, key, value = mla_rope(q, kv, k_rope, *rotation(1, 5, 8))
    assert query.transpose(1, 2).is_contiguous() and key.transpose(1, 2).is_contiguous()
    assert value.data_ptr() == kv[..., 16:].data_ptr() and value.transpose(1, 2).stride() == kv.stride()


def test_only_keys_used_leaves_queries_and_values_with_zero_gradients():
    leaves = leaf(1, 5, 4, 24), leaf(1, 5, 4, 28), leaf(1, 5, 8)
    with on_triton():
        _, dq, dkv, dk_rope = outputs_and_grads(lambda *x: mla_rope(*x, *rotation(1, 5, 8))[1], *leaves)
    assert dq.count_nonzero() == dkv[..., 16:].count_nonzero() == 0
    assert dkv[..., :16].all() and dk_rope.all() and dk_rope.isfinite().all()


def test_shapes_that_do_not_belong_together_are_refused():
    q, kv, k_rope = torch.randn(2, 5, 3, 24), torch.randn(2, 5, 3, 28), torch.randn(2, 5, 8)
    cos, sin = rotation(1, 5, 8)
    for wrong in (
        (q, kv[:, :, :2], k_rope),
        (q, kv, k_rope[:, :4]),
        (q, kv, k_rope[..., :7]),
        (q, kv[..., :16], k_rope),
    ):
        with pytest.raises(AssertionError):
            mla_rope(*wrong, cos, sin)
    with pytest.raises(AssertionError):
        mla_rope(q, kv, k_rope, cos[..., :4], sin[..., :4])
