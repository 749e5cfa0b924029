"""The twin that replaces one function of an HF forward: the rest of that forward stays, and so does the module."""

import copy
from functools import partial

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from expertmesh.layers import attention
from expertmesh.layers.attention import FastRoPE
from tests.kernels.compare import on_triton
from tests.models import shared_pair


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "ernie4_5_moe"])
def test_the_kernel_is_called_where_stock_called_its_function(family, monkeypatch):
    calls, kernel = [], attention.rotary
    monkeypatch.setattr(attention, "rotary", lambda *args, **options: calls.append(args) or kernel(*args, **options))
    stock, ours = shared_pair(family)
    ids = torch.arange(9)[None]
    expected = stock(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected)
    assert not calls  # on a CPU it is stock's
    with on_triton():
        torch.testing.assert_close(copy.deepcopy(ours)(ids).logits, expected)
    attentions = [module for module in ours.modules() if isinstance(module, FastRoPE)]
    assert len(calls) == len(attentions) > 0


def test_heads_in_another_place_get_the_stock_function():
    q, k, cos, sin = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    stock = modeling_mixtral.apply_rotary_pos_emb
    got, want = (turn(q, k, cos, sin, unsqueeze_dim=2) for turn in (partial(FastRoPE.apply_rope, stock), stock))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_attention_that_may_turn_otherwise_stays_stock():
    stock, _ = shared_pair("deepseek_v3")
    assert "apply_rotary_pos_emb_interleave" in FastRoPE.why_not(stock.model.layers[0].self_attn)
