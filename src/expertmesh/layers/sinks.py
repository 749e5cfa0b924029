"""Attention with sinks (GPT-OSS) on our kernels: what Transformers has no SDPA for, and runs eagerly by default.

The implementation `NAME` replaces a model's default, never one that the user asked for. It knows windows, documents and
padding. Where the kernels do not apply, as with a cache that holds tokens, Transformers' eager attention runs.
"""

from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from expertmesh.backends import product_dtype
from expertmesh.kernels.documents import Bounds
from expertmesh.kernels.rope import rotary
from expertmesh.kernels.sink_attention import Padding, padding_of, sink_attention, takes, visible
from expertmesh.layers.attention import documents_or_mask
from expertmesh.layers.rope import FastRoPE

NAME = "expertmesh-sinks"


def attend_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Padding | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    documents: Any = None,
    document_bounds: Bounds | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the `eager_attention_forward` of Transformers' GPT-OSS; no weights are returned where the kernels ran."""
    dtype = product_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    documents, padding = documents_or_mask(attention_mask, documents, module)
    if isinstance(padding, torch.Tensor):
        return eager_attention_forward(module, query, key, value, padding, scaling, dropout, **kwargs)
    bounds = None if documents is None else document_bounds
    if dropout == 0 and s_aux is not None and takes(query) and getattr(module, "in_fused_model", False):
        return sink_attention(query, key, value, s_aux, scaling, sliding_window, bounds, padding), None
    start, seen = bounds and bounds.start, padding and padding.seen
    mask = visible(query.shape[2], query.device, sliding_window, start, seen)[:, None]
    mask = query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(dtype).min)
    return eager_attention_forward(module, query, key, value, mask, scaling, dropout, **kwargs)


def padding_or_mask(**asked: Any) -> torch.Tensor | Padding | None:
    """What our kernels need to know of rows that were not taken apart, or Transformers' eager mask."""
    offset, mask = asked["q_offset"], asked["attention_mask"]
    whole = isinstance(offset, int) and offset == asked["kv_offset"] == 0 and asked["q_length"] == asked["kv_length"]
    if not whole or asked["use_vmap"] or not asked["allow_is_causal_skip"]:
        return masking_utils.eager_mask(**asked)
    return None if mask is None else padding_of(mask[:, : asked["kv_length"]])


AttentionInterface.register(NAME, attend_with_sinks)
masking_utils.AttentionMaskInterface.register(NAME, padding_or_mask)


class FastSinkAttention(FastRoPE):
    """`GptOssAttention` with its own RoPE in one kernel; its attention is `attend_with_sinks`."""

    probed = True
    stands_for = ("forward", "apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward")

    @classmethod
    def turn(
        cls, stock: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert unsqueeze_dim == 1, "heads before positions"
        return rotary(q, k, cos, sin, half=True)

    @staticmethod
    def why_not(attention: Any) -> str | None:
        chosen = attention.config._attn_implementation
        return None if chosen == NAME else f"attn_implementation={chosen!r} was asked for"
