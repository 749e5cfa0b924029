"""Causal attention of fused models.

`NAME` is registered as an attention implementation and stands for "sdpa", Transformers' default, in fused models: the
same numbers, but it takes packed documents beside the mask (rows.py), and goes to flash-attn-4 where that is installed.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents
from expertmesh.kernels.varlen import document_mask, takes, varlen_attention
from expertmesh.layers.rows import is_placeholder, unlost

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
