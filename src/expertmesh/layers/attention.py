"""Causal attention of fused models, and what the twins of attention modules share.

The implementation `NAME` stands for "sdpa", Transformers' default, in fused models: the same numbers, but it takes
packed documents beside the mask (rows.py), and goes to flash-attn-4 where that is installed. `SINKS` is attention with
sinks (GPT-OSS) by FlashAttention, for which Transformers has no SDPA: it replaces the default, which is eager, never
what the user asked for. It knows windows and documents; where there is a mask, for a cache that holds tokens or for
padding in rows that were not taken apart, Transformers' eager attention runs.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward
from transformers.utils.import_utils import is_tracing

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_mask, supports, varlen_attention
from expertmesh.kernels.mla_rope import mla_rope, rotated
from expertmesh.kernels.rope import qk_norm_rope, rotary
from expertmesh.kernels.sink_attention import sink_attention, visible
from expertmesh.layers.decoder import FastRMSNorm
from expertmesh.layers.lora import lora_linears
from expertmesh.twins import Fast, is_unmodified, pop_cache

NAME, SINKS = "expertmesh", "expertmesh-sinks"
_ROPE = "apply_rotary_pos_emb"
Turn = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the positions
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values


def causal_placeholder(documents: Documents | None, device: torch.device) -> torch.Tensor:
    """The mask that says: causal, within `documents` if there are any, of which its last size tells layers."""
    return torch.empty(1, 1, 0, int(documents is not None), dtype=torch.bool, device=device)


def documents_or_mask(mask: Any, documents: Documents | None, layer: Any) -> tuple[Documents | None, Any]:
    """(documents, None) where the mask is a `causal_placeholder`, else (None, mask).

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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' `sdpa_attention_forward`, within `documents` where the mask is a `causal_placeholder`."""
    documents, mask = documents_or_mask(attention_mask, documents, module)
    plain = mask is None and dropout == 0 and kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if plain and getattr(module, "in_fused_model", False):
        causal = kwargs.get("is_causal")
        causal = module.is_causal if causal is None else causal
        if causal and backends.FLASH_ATTENTION and flash_attention.supports(query, key, value):
            return flash_attention.flash_attention(query, key, value, scaling, documents=documents), None
        if documents is not None and backends.has_varlen(query) and supports(query, value):
            return varlen_attention(query, key, value, *documents, scaling), None
    if documents is not None:
        backends.warn_once(
            f"{type(module).__name__} keeps documents apart by a mask of all pairs of tokens: to do without it takes "
            f"bfloat16 or float16 on Ampere or newer, and no dropout, softcap or position bias."
        )
        mask = document_mask(documents.cu_seqlens, query.shape[0], query.shape[2])
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def attend_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Any = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the `eager_attention_forward` of Transformers' GPT-OSS; no weights are returned where it did not run."""
    dtype = backends.matmul_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    documents, mask = documents_or_mask(attention_mask, documents, module)
    if mask is None and dropout == 0 and getattr(module, "in_fused_model", False):
        return sink_attention(query, key, value, s_aux, scaling, sliding_window, documents), None
    if mask is None:
        seen = visible(query, sliding_window, documents)
        mask = query.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(dtype).min)
    return gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling, dropout, **kwargs)


def mask_with_sinks(**asked: Any) -> torch.Tensor | None:
    """Transformers' eager mask; None for whole rows without padding, where order and window say it all. To know that
    takes a look at the device, which no graph can have."""
    offset, mask, length = asked["q_offset"], asked["attention_mask"], asked["kv_length"]
    whole = isinstance(offset, int) and offset == asked["kv_offset"] == 0 and asked["q_length"] == length
    plain = whole and asked["allow_is_causal_skip"] and not asked["use_vmap"]
    if plain and (mask is None or (not is_tracing(mask) and mask[:, :length].all())):
        return None
    return masking_utils.eager_mask(**asked)


AttentionInterface.register(NAME, attend)
AttentionInterface.register(SINKS, attend_with_sinks)
masking_utils.AttentionMaskInterface.register(NAME, masking_utils.sdpa_mask)  # for what is no placeholder
masking_utils.AttentionMaskInterface.register(SINKS, mask_with_sinks)


class FastAttention(Fast):
    """Causal attention whose queries, keys and values a subclass makes, by the implementation that the user chose.

    heads: (hidden states, position embeddings, cache or None, the forward's keywords, which go on to the
    implementation) → queries, keys and values [B, N, S, D], those of the cache included.
    """

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Turn, attention_mask: Any, *cache: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past = cache[0] if cache else pop_cache(kwargs)
        if self.why_not(self) is not None:  # what its kernel stands for was replaced or hooked after fusing: call it
            return super().forward(hidden_states, position_embeddings, attention_mask, past, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings, past, kwargs)
        chosen = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = chosen(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*out.shape[:2], -1).contiguous()), weights


class FastQKNormAttention(FastAttention):
    """Must equal `Qwen3MoeAttention.forward` of Transformers."""

    stands_for = ("forward", "apply_rotary_pos_emb", "rotate_half")

    def heads(self, hidden_states: torch.Tensor, turn: Turn, past: Any, kwargs: dict[str, Any]) -> Heads:
        heads, weights = (*hidden_states.shape[:-1], -1, self.head_dim), (self.q_norm.weight, self.k_norm.weight)
        query, key, value = lora_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = query.view(heads), key.view(heads), value.view(heads).transpose(1, 2)
        query, key = qk_norm_rope(query, key, *weights, *turn, self.q_norm.variance_epsilon)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx, kwargs=kwargs)
        kwargs["sliding_window"] = self.sliding_window
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        if is_unmodified(q_norm, k_norm, kind=FastRMSNorm) and q_norm.scale == k_norm.scale == "rounded":
            return None
        return "its q/k-norms are not fused RMSNorms of Llama's kind"


class FastLatentAttention(FastAttention):
    """Must equal `DeepseekV3Attention.forward` of Transformers: latent attention (MLA).

    On the way of "sdpa" queries and keys are 192 wide and values 128: on Hopper and newer cuDNN takes that as it is,
    before Hopper PyTorch's memory-efficient kernel; never a matrix of S x S.
    """

    stands_for = ("forward", "expand_kv", "apply_rotary_pos_emb_interleave")

    def heads(self, hidden_states: torch.Tensor, turn: Turn, past: Any, kwargs: dict[str, Any]) -> Heads:
        batch, seq = hidden_states.shape[:-1]
        first = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        q, latents = lora_linears(hidden_states, first, self.kv_a_proj_with_mqa)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.view(batch, seq, -1, self.qk_head_dim)
        latent, k_rope = latents.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, cached = self.kv_a_layernorm(latent), None
        if past is not None:  # it keeps latents and rotated positions, as stock does
            turned = rotated(k_rope[:, None], *turn)
            cached = past.update(latent[:, None], turned, self.layer_idx, kwargs=kwargs)
        if cached is None or cached[0].shape[2] == seq:  # all keys are of these tokens
            kv = self.kv_b_proj(latent).view(batch, seq, -1, self.qk_nope_head_dim + self.v_head_dim)
            query, key, value = mla_rope(q, kv, k_rope, *turn)
        else:
            query = rotated(q.transpose(1, 2), *turn)
            key, value = self.expand_kv(*cached)
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        return None if attention.config.rope_interleave else "its RoPE turns halves, not pairs (rope_interleave=False)"


class FastRoPE(Fast):
    """HF's forward with a kernel for RoPE of halves, of the whole width of a head (Mixtral) or a part (GLM).

    Only the name `apply_rotary_pos_emb` stands for another function in it. So one rule serves the attention of all
    families with the same RoPE, whatever else they do.
    """

    stands_for: tuple[str, ...] = (_ROPE, "rotate_half")
    probed = False
    _options: dict[str, bool] = {}  # of `rotary`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__stock__" in vars(cls):  # a twin is made
            stock = inspect.unwrap(cls.__stock__.forward)  # type: ignore[attr-defined]
            scope = stock.__globals__ | {_ROPE: functools.partial(cls.turn, stock.__globals__[_ROPE])}
            del scope["__name__"]  # by which torch.compile would look the names up in the HF module
            forward = types.FunctionType(stock.__code__, scope, None, stock.__defaults__, stock.__closure__)
            forward.__kwdefaults__ = stock.__kwdefaults__
            cls.forward = functools.wraps(stock)(forward)

    @classmethod
    def turn(
        cls, stock: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What runs in place of `stock`, the function of this name in the HF class' module."""
        if unsqueeze_dim != 1 or cos.ndim != 3 or not backends.use_triton(q):  # the kernel has another layout
            return stock(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin, **cls._options)

    @staticmethod
    def why_not(attention: Any) -> str | None:
        names = inspect.unwrap(type(attention).forward).__code__.co_names
        others = [name for name in names if "rotary_pos_emb" in name and name != _ROPE]
        return f"its forward also calls {others[0]}" if others else None


class FastInterleavedRoPE(FastRoPE):
    """The same for RoPE of even and odd elements (ERNIE 4.5)."""

    _options = {"interleaved": True}


class FastSinkAttention(FastRoPE):
    """`GptOssAttention` with its own RoPE in one kernel; its attention is `attend_with_sinks`."""

    probed = True
    stands_for = ("forward", "apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward")
    _options = {"half": True}

    @staticmethod
    def why_not(attention: Any) -> str | None:
        chosen = attention.config._attn_implementation
        return None if chosen == SINKS else f"attn_implementation={chosen!r} was asked for"
