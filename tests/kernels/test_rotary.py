"""RoPE of queries and keys: the kernel against its reference, and that against the functions of three families."""

import pytest
import torch
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_next import modeling_qwen3_next

from expertmesh.kernels.rope import rotary
from tests.kernels.compare import assert_same, leaf, on_triton, outputs_and_grads


def rotation(batch: int, seq: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin whose two halves differ, so that taking the wrong half shows."""
    angle = torch.randn(batch, seq, width)
    return angle.cos(), angle.sin()


def reference(q, k, cos, sin, interleaved=False, half=False):
    """The functions of three families."""
    family = modeling_gpt_oss if half else modeling_ernie4_5_moe if interleaved else modeling_glm4_moe
    return family.apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "width"), [(modeling_mixtral, 24), (modeling_qwen3_next, 8)])
def test_families_with_the_same_rotation_are_bit_equal(family, width, dtype):
    q, k = torch.randn(2, 6, 5, 24).to(dtype), torch.randn(2, 2, 5, 24).to(dtype)
    cos, sin = (x.to(dtype) for x in rotation(1, 5, width))
    expected = family.apply_rotary_pos_emb(q, k, cos, sin)
    assert all(torch.equal(*pair) for pair in zip(reference(q, k, cos, sin), expected, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("batch", "seq", "q_heads", "k_heads", "width", "turned", "rotations"),
    [(1, 1, 1, 1, 24, 24, 1), (2, 7, 6, 2, 24, 8, 1), (3, 5, 4, 4, 16, 16, 3), (1, 9, 5, 1, 100, 50, 1)],
)
def test_kernel_equals_reference(batch, seq, q_heads, k_heads, width, turned, rotations, interleaved):
    leaves = leaf(batch, q_heads, seq, width), leaf(batch, k_heads, seq, width)
    cos, sin = rotation(rotations, seq, width if interleaved else turned)  # ERNIE's function turns whole heads
    expected = outputs_and_grads(lambda *x: reference(*x, cos, sin, interleaved), *leaves)
    with on_triton():
        got = outputs_and_grads(lambda *x: rotary(*x, cos, sin, interleaved), *leaves)
    assert_same(got, expected)


def test_strided_inputs_and_gradients_are_read_by_their_strides():
    cos, sin = (x[:, 2:12:2, 5:13] for x in rotation(1, 12, 48))
    qkv, other = leaf(2, 5, 8, 24), leaf(4, 2, 24, 5)

    def run(kernel):
        def fn(qkv, other):
            q, _ = kernel(qkv[:, :, :5].transpose(1, 2), qkv[:, :, 5:7].transpose(1, 2), cos, sin)
            last, k = kernel(other[::2].transpose(2, 3), qkv[:, :, 5:7].transpose(1, 2), cos, sin)
            return q.transpose(2, 3), last, k[:, :1].expand(-1, 3, -1, -1)

        return outputs_and_grads(fn, qkv, other)

    expected = run(reference)
    with on_triton():
        assert_same(run(rotary), expected)


def test_rotations_of_another_shape_are_refused():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    for cos in (torch.randn(1, 4, 10), torch.randn(4, 8), torch.randn(1, 4, 7)):
        with pytest.raises(AssertionError):
            rotary(q, k, cos, cos)


@pytest.mark.parametrize("rotations", [1, 2])
def test_rotations_of_half_the_width_serve_both_halves(rotations):
    (q, k), (cos, sin) = [leaf(2, 3, 5, 12), leaf(2, 1, 5, 12)], rotation(rotations, 5, 6)
    expected = outputs_and_grads(lambda q, k: reference(q, k, cos, sin, half=True), q, k)
    with on_triton():
        assert_same(outputs_and_grads(lambda q, k: rotary(q, k, cos, sin, half=True), q, k), expected)
