"""Causal attention of fused models, and the fast twin of attention with per-head q/k-norm (Qwen3).

`NAME` is registered as an attention implementation and stands for "sdpa", Transformers' default, in fused models: the
same numbers, but it takes packed documents beside the mask (rows.py), and goes to flash-attn-4 where that is installed.
The twin computes norm and RoPE of queries and keys in one kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents
from expertmesh.kernels.rope import qk_norm_rope
from expertmesh.kernels.varlen import document_mask, takes, varlen_attention
from expertmesh.layers.norm import can_merge
from expertmesh.layers.rows import is_placeholder, unlost
from expertmesh.twins import Fast, cache_of

NAME = "expertmesh"


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' `sdpa_attention_forward`, within `documents` where the mask is a `placeholder`."""
    mask = attention_mask
    if is_placeholder(mask):
        documents, mask = unlost(mask, documents, module), None
    else:
        documents = None
    if mask is None and position_bias is None and dropout == 0 and kwargs.get("softcap") is None:
        is_causal = kwargs.get("is_causal")
        causal = module.is_causal if is_causal is None else is_causal
        if causal and flash_attention.takes(query, key, value):
            return flash_attention.flash_attention(query, key, value, scaling, documents=documents), None
        if documents is not None and _has_varlen(query) and takes(query, value):
            return varlen_attention(query, key, value, *documents, scaling), None
    if documents is not None:
        backends.tell_once(
            f"{type(module).__name__} keeps documents apart by a mask of all pairs of tokens: to do without it takes "
            f"bfloat16 or float16 on Ampere or newer, and no dropout, softcap or position bias."
        )
        mask = document_mask(documents.cu_seqlens, query.shape[0], query.shape[2])
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs
    )


def _has_varlen(query: torch.Tensor) -> bool:
    device = query.device
    autocast = torch.is_autocast_enabled(device.type)
    return backends.has_varlen(device, torch.get_autocast_dtype(device.type) if autocast else query.dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for what is no placeholder


def attended(
    attention: Any,
    eager: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What an attention module returns: its chosen implementation's output, projected, and the weights or None.

    query, key, value: [B, N, S, D]. eager: its family's own implementation. kwargs go to the implementation.
    """
    chosen = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    dropout = attention.attention_dropout if attention.training else 0.0
    out, weights = chosen(
        attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs
    )
    return attention.o_proj(out.reshape(*out.shape[:2], -1).contiguous()), weights


class FastQKNormAttention(Fast):
    """Must equal `Qwen3MoeAttention.forward` of Transformers."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        *cache: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past = cache[0] if cache else cache_of(kwargs)
        if why_not_qk_norm(self) is not None:  # norms replaced or hooked after fusing: call them
            return super().forward(hidden_states, position_embeddings, attention_mask, past, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = qk_norm_rope(
            self.q_proj(hidden_states).view(heads),
            self.k_proj(hidden_states).view(heads),
            self.q_norm.weight,
            self.k_norm.weight,
            *position_embeddings,
            self.q_norm.variance_epsilon,
        )
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx, kwargs=kwargs)
        kwargs["sliding_window"] = self.sliding_window
        return attended(self, eager_attention_forward, query, key, value, attention_mask, **kwargs)


def why_not_qk_norm(attention: Any) -> str | None:
    """Why this attention must stay stock, or None."""
    norms = (attention.q_norm, attention.k_norm)
    if all(can_merge(norm) and norm.scale == "rounded" for norm in norms):
        return None
    return "its q/k-norms are not fused RMSNorms of Llama's kind"
