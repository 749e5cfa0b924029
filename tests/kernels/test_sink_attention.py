"""Attention with sinks: the reference is Transformers' eager attention; FlashAttention, corrected, is the reference."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from expertmesh.kernels import sink_attention as kernels
from expertmesh.kernels.documents import Documents
from expertmesh.kernels.sink_attention import sink_attention, visible
from tests.kernels.compare import assert_same, leaf, outputs_and_grads


def leaves(length: int, heads: int = 4, key_heads: int = 2, rows: int = 2, width: int = 16) -> tuple[torch.Tensor, ...]:
    shapes = (rows, heads, length, width), (rows, key_heads, length, width), (rows, key_heads, length, width), (heads,)
    return tuple(leaf(*shape) for shape in shapes)


def documents_of(lengths: list[int]) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_the_reference_is_the_eager_attention_of_transformers(window):
    inputs = leaves(9)
    token = torch.arange(9)
    seen = (token <= token[:, None]) & (token > token[:, None] - (window or 9))
    assert torch.equal(visible(inputs[0], window, None)[0, 0], seen)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

    def eager(query, key, value, sinks):
        module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=True)
        return eager_attention_forward(module, query, key, value, mask, scaling=0.3)[0]

    ours = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window=window), *inputs)
    assert_same(ours, outputs_and_grads(eager, *inputs))


def scores_of(query, key, options):
    """[NQ, T, T] with -inf where a key is not seen, and how many query heads share a key head."""
    begins, longest, before = options["cum_seq_q"], options["max_q"], options["window_size_left"]
    assert begins is options["cum_seq_k"] and longest == options["max_k"] and options["dropout_p"] == 0
    assert begins.dtype == torch.int32 and begins[-1] == len(query) and longest >= begins.diff().max()
    assert before >= -1 and options["window_size_right"] == 0 and options["is_causal"] == (before == -1)
    seen = visible(query.transpose(0, 1)[None], None if before < 0 else before + 1, Documents(begins, longest))[0]
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("rhd,nhd->hrn", query, key.repeat_interleave(group, dim=1)) * options["scale"]
    return scores.masked_fill(~seen, -math.inf), group


def plain_forward(query, key, value, options):
    """FlashAttention's, which knows no sinks."""
    scores, group = scores_of(query, key, options)
    out = torch.einsum("hrn,nhd->rhd", scores.softmax(-1), value.repeat_interleave(group, dim=1))
    return out.contiguous(), scores.logsumexp(-1)


def plain_backward(dout, query, key, value, out, lse, options):
    """FlashAttention's, step by step: everything it knows of the softmax it has from `lse` and `out`."""
    assert lse.is_contiguous()
    scores, group = scores_of(query, key, options)
    p = (scores - lse[..., None]).exp()
    delta = (dout * out).sum(-1).t()
    dp = torch.einsum("rhd,nhd->hrn", dout, value.repeat_interleave(group, dim=1))
    ds = p * (dp - delta[..., None]) * options["scale"]
    dquery = torch.einsum("hrn,nhd->rhd", ds, key.repeat_interleave(group, dim=1))
    dkey, dvalue = (torch.einsum("hrn,rhd->nhd", *x).unflatten(1, (-1, group)).sum(2) for x in ((ds, query), (p, dout)))
    return dquery, dkey, dvalue


@pytest.fixture
def flash(monkeypatch) -> None:
    """CPU tensors take the way of FlashAttention-2, whose two kernels are plain PyTorch."""
    monkeypatch.setattr(kernels, "_is_for_flash_attention_2", lambda *_: True)
    monkeypatch.setattr(kernels, "flash_forward", plain_forward)
    monkeypatch.setattr(kernels, "flash_backward", plain_backward)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [None, [1, 10, 1, 7, 1, 20]])
@pytest.mark.parametrize("window", [None, 1, 8, 20, 100])
def test_flash_attention_corrected_is_the_reference(window, lengths, heads, flash):
    inputs = [x.detach().double().requires_grad_() for x in leaves(20, *heads)]
    documents = documents_of(lengths) if lengths else None
    got = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window, documents), *inputs)
    want = outputs_and_grads(lambda *x: kernels.sink_attention_reference(*x, 0.3, window, documents), *inputs)
    assert got[0].is_contiguous()
    assert_same(got, want, 1e-12)


def test_extreme_sinks_take_it_all_or_nothing_and_stay_finite(flash):
    inputs = [x.detach().double().requires_grad_() for x in leaves(12)[:3]]
    for logit in (-1e4, 1e4):
        sinks = torch.full((4,), logit, dtype=torch.float64, requires_grad=True)
        got = outputs_and_grads(lambda *x: sink_attention(*x, 0.3), *inputs, sinks)
        want = outputs_and_grads(lambda *x: kernels.sink_attention_reference(*x, 0.3), *inputs, sinks)
        assert_same(got, want, 1e-12)


def test_frozen_sinks_get_no_gradient_and_others_keep_their_dtype(flash):
    *inputs, sinks = leaves(12)
    out = sink_attention(*inputs, sinks.detach(), 0.3)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), inputs))
    half = sinks.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(sink_attention(*inputs, half, 0.3).sum(), [half])
    assert gradient.dtype == torch.bfloat16 and gradient.shape == (4,)


def test_pytorchs_kernels_have_these_arguments(monkeypatch):
    """It finds on a CPU that there is no kernel, behind the check of all arguments."""
    monkeypatch.setattr(kernels, "_is_for_flash_attention_2", lambda *_: True)
    inputs = [x.detach() for x in leaves(12)]
    with pytest.raises(NotImplementedError, match="_flash_attention_forward.*CPU"):
        sink_attention(*inputs, 0.3, 4)
    monkeypatch.setattr(kernels, "flash_forward", plain_forward)
    with pytest.raises(NotImplementedError, match="_flash_attention_backward.*CPU"):
        sink_attention(*(x.requires_grad_() for x in inputs), 0.3).sum().backward()


@pytest.mark.parametrize("window", [None, 20, 140])
@pytest.mark.parametrize("lengths", [[[1, 40, 31, 1, 7], [80]], [[1] * 80, [64, 16]]])
def test_documents_packed_into_rows_do_not_see_each_other(lengths, window):
    documents = documents_of([n for row in lengths for n in row])
    inputs = leaves(80, 2, 1)

    def apart(*x):
        rows = []
        for row in range(2):
            parts = zip(*(y[row : row + 1].split(lengths[row], dim=2) for y in x[:3]), strict=True)
            rows.append(torch.cat([sink_attention(*part, x[3], 0.3, window=window) for part in parts], dim=1))
        return torch.cat(rows)

    packed = outputs_and_grads(lambda *x: sink_attention(*x, 0.3, window=window, documents=documents), *inputs)
    assert_same(packed, outputs_and_grads(apart, *inputs))


def test_a_query_whose_sink_takes_it_all_gives_nothing():
    query, key, value, _ = leaves(8)
    assert not sink_attention(query, key, value, torch.full((4,), 1e4), 1.0).any()


def test_without_a_sink_it_is_causal_attention():
    query, key, value, _ = leaves(40)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(sink_attention(query, key, value, torch.full((4,), -1e4), 0.25), expected)
