"""Causal attention of fused models, and what the twins of attention modules share.

`NAME` is registered as an attention implementation and stands for "sdpa", Transformers' default, in fused models: the
same numbers, but it takes packed documents beside the mask (rows.py), and goes to flash-attn-4 where that is installed.
"""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_mask, takes, varlen_attention
from expertmesh.twins import Fast, cache_of

NAME = "expertmesh"


def placeholder(documents: Documents | None, device: torch.device) -> torch.Tensor:
    """The mask that says: causal, within `documents` if there are any. Its last size is 1 if there are, so that a layer
    that did not get them knows."""
    return torch.empty(1, 1, 0, int(documents is not None), dtype=torch.bool, device=device)


def documents_or_mask(mask: Any, documents: Documents | None, layer: Any) -> tuple[Documents | None, Any]:
    """(documents, None) where the mask is a `placeholder`, else (None, mask).

    Raises RuntimeError if the placeholder speaks of documents and they did not reach this layer.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[2] != 0:
        return None, mask
    if documents is None and mask.shape[3]:
        raise RuntimeError(
            f"{type(layer).__name__} was not told of the documents in its rows, because Transformers did not pass them "
            f"on: give each document a row of its own (packing=False), and please report this model."
        )
    return documents, None


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
    documents, mask = documents_or_mask(attention_mask, documents, module)
    plain = mask is None and position_bias is None and dropout == 0 and kwargs.get("softcap") is None
    if plain and getattr(module, "in_fused_model", False):
        is_causal = kwargs.get("is_causal")
        causal = module.is_causal if is_causal is None else is_causal
        if causal and backends.FLASH_ATTENTION and flash_attention.takes(query, key, value):
            return flash_attention.flash_attention(query, key, value, scaling, documents=documents), None
        if documents is not None and backends.has_varlen(query) and takes(query, value):
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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for what is no placeholder


class FastAttention(Fast):
    """Causal attention whose queries, keys and values a subclass makes, by the implementation that the user chose.

    eager: its family's own implementation. heads: (hidden states, position embeddings, cache or None, the forward's
    keywords, which go on to the implementation) → queries, keys and values [B, N, S, D], those of the cache included.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        *cache: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past = cache[0] if cache else cache_of(kwargs)
        if self.why_not(self) is not None:  # what its kernel stands for was replaced or hooked after fusing: call it
            return super().forward(hidden_states, position_embeddings, attention_mask, past, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings, past, kwargs)
        chosen = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = chosen(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*out.shape[:2], -1).contiguous()), weights
