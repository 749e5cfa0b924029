"""Causal attention of fused models: two attention implementations and the fast subclasses of attention modules.

`NAME` replaces "sdpa", Transformers' default. It gives the same numbers, but accepts packed documents in addition to a
mask (rows.py) and uses flash-attn-4 if that is installed. `SINKS` runs attention with sinks (GPT-OSS) with a flash
kernel, because Transformers has no SDPA for it. It replaces only the default (eager), never an implementation that the
user requested. It supports sliding windows and documents. If there is a mask (a cache that holds tokens, or padding
that was not removed), Transformers' eager attention runs.
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
CosSin = tuple[torch.Tensor, torch.Tensor]  # the position embeddings
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values


def causal_placeholder(documents: Documents | None, device: torch.device) -> torch.Tensor:
    """Return an empty mask that means "causal, within documents". Its last size is 1 if there are documents, else 0."""
    return torch.empty(1, 1, 0, int(documents is not None), dtype=torch.bool, device=device)


def documents_or_mask(mask: Any, documents: Documents | None, layer: Any) -> tuple[Documents | None, Any]:
    """Return (documents, None) if the mask is a `causal_placeholder`, else (None, mask). Raise RuntimeError if the
    placeholder announces documents but the layer did not receive them."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[2] != 0:
        return None, mask
    if documents is None and mask.shape[3]:
        raise RuntimeError(
            f"{type(layer).__name__} did not receive the document boundaries, because Transformers did not pass them "
            f"on. Put one document in each row (packing=False), and please report this model."
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
    """Run `sdpa_attention_forward` of Transformers, within `documents` if the mask is a `causal_placeholder`."""
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
            f"{type(module).__name__} separates documents with a mask of all pairs of tokens. A kernel without a mask "
            f"needs bfloat16 or float16 on Ampere or newer, and no dropout, softcap or position bias."
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
    """Compute Transformers' eager attention of GPT-OSS. Attention weights are returned only by the eager fallback."""
    dtype = backends.matmul_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    documents, mask = documents_or_mask(attention_mask, documents, module)
    if mask is None and dropout == 0 and getattr(module, "in_fused_model", False):
        return sink_attention(query, key, value, s_aux, scaling, sliding_window, documents), None
    if mask is None:
        allowed = visible(query, sliding_window, documents)
        mask = query.new_zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(dtype).min)
    return gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling, dropout, **kwargs)


def mask_with_sinks(**kwargs: Any) -> torch.Tensor | None:
    """Return Transformers' eager mask, or None for full rows without padding, which need only causality and the window.
    The check for padding synchronizes with the device, so it is skipped while tracing."""
    offset, mask, length = kwargs["q_offset"], kwargs["attention_mask"], kwargs["kv_length"]
    full_rows = isinstance(offset, int) and offset == kwargs["kv_offset"] == 0 and kwargs["q_length"] == length
    skippable = full_rows and kwargs["allow_is_causal_skip"] and not kwargs["use_vmap"]
    if skippable and (mask is None or (not is_tracing(mask) and mask[:, :length].all())):
        return None
    return masking_utils.eager_mask(**kwargs)


AttentionInterface.register(NAME, attend)
AttentionInterface.register(SINKS, attend_with_sinks)
masking_utils.AttentionMaskInterface.register(NAME, masking_utils.sdpa_mask)  # used if there is no placeholder
masking_utils.AttentionMaskInterface.register(SINKS, mask_with_sinks)


class FastAttention(Fast):
    """Causal attention that runs the attention implementation of the configuration. Subclasses define `heads`.

    heads(hidden states, position embeddings, cache or None, kwargs of the forward) returns queries, keys and values
    [B, N, S, D]; keys and values include cached ones. It may edit kwargs, which are passed to the implementation.
    """

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: CosSin, attention_mask: Any, *cache: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past = cache[0] if cache else pop_cache(kwargs)
        if self.why_not(self) is not None:  # a submodule that the kernel replaces was changed or hooked after fusing
            return super().forward(hidden_states, position_embeddings, attention_mask, past, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings, past, kwargs)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = run(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*out.shape[:2], -1).contiguous()), weights


class FastQKNormAttention(FastAttention):
    """Must equal `Qwen3MoeAttention.forward` of Transformers."""

    stands_for = ("forward", "apply_rotary_pos_emb", "rotate_half")

    def heads(self, hidden_states: torch.Tensor, cos_sin: CosSin, past: Any, kwargs: dict[str, Any]) -> Heads:
        heads, weights = (*hidden_states.shape[:-1], -1, self.head_dim), (self.q_norm.weight, self.k_norm.weight)
        query, key, value = lora_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = query.view(heads), key.view(heads), value.view(heads).transpose(1, 2)
        query, key = qk_norm_rope(query, key, *weights, *cos_sin, self.q_norm.variance_epsilon)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx, kwargs=kwargs)
        kwargs["sliding_window"] = self.sliding_window
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        if is_unmodified(q_norm, k_norm, kind=FastRMSNorm) and q_norm.scale == k_norm.scale == "rounded":
            return None
        return "its q/k-norms are not fused RMSNorms that round before the weight, as Llama's"


class FastLatentAttention(FastAttention):
    """Must equal `DeepseekV3Attention.forward` of Transformers: latent attention (MLA).

    Queries and keys are 192 wide and values 128. SDPA supports that without padding and without an S x S matrix: with
    cuDNN on Hopper and newer GPUs, with the memory-efficient kernel on older ones.
    """

    stands_for = ("forward", "expand_kv", "apply_rotary_pos_emb_interleave")

    def heads(self, hidden_states: torch.Tensor, cos_sin: CosSin, past: Any, kwargs: dict[str, Any]) -> Heads:
        batch, seq = hidden_states.shape[:-1]
        first = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        q, latents = lora_linears(hidden_states, first, self.kv_a_proj_with_mqa)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.view(batch, seq, -1, self.qk_head_dim)
        latent, k_rope = latents.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, cached = self.kv_a_layernorm(latent), None
        if past is not None:  # like Transformers', the cache holds latents and rotated keys
            rotated_k = rotated(k_rope[:, None], *cos_sin)
            cached = past.update(latent[:, None], rotated_k, self.layer_idx, kwargs=kwargs)
        if cached is None or cached[0].shape[2] == seq:  # the cache held no earlier tokens
            kv = self.kv_b_proj(latent).view(batch, seq, -1, self.qk_nope_head_dim + self.v_head_dim)
            query, key, value = mla_rope(q, kv, k_rope, *cos_sin)
        else:
            query = rotated(q.transpose(1, 2), *cos_sin)
            key, value = self.expand_kv(*cached)
        return query, key, value

    @staticmethod
    def why_not(attention: Any) -> str | None:
        return None if attention.config.rope_interleave else "its RoPE rotates halves (rope_interleave=False)"


class FastRoPE(Fast):
    """Transformers' forward with a kernel for RoPE that rotates halves, of a whole head (Mixtral) or a part (GLM).

    The twin's forward is a copy whose globals differ only in `apply_rotary_pos_emb`. So one rule serves every attention
    class with this RoPE.
    """

    stands_for: tuple[str, ...] = (_ROPE, "rotate_half")
    probed = False
    _options: dict[str, bool] = {}  # keyword arguments of `rotary`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__stock__" in vars(cls):  # this subclass is a twin, not a mixin
            stock = inspect.unwrap(cls.__stock__.forward)  # type: ignore[attr-defined]
            namespace = stock.__globals__ | {_ROPE: functools.partial(cls.apply_rope, stock.__globals__[_ROPE])}
            del namespace["__name__"]  # else torch.compile looks names up in Transformers' module of this name
            forward = types.FunctionType(stock.__code__, namespace, None, stock.__defaults__, stock.__closure__)
            forward.__kwdefaults__ = stock.__kwdefaults__
            cls.forward = functools.wraps(stock)(forward)

    @classmethod
    def apply_rope(
        cls, stock: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace `stock`, which is `apply_rotary_pos_emb` of the Transformers module."""
        if unsqueeze_dim != 1 or cos.ndim != 3 or not backends.use_triton(q):  # the kernel supports one layout only
            return stock(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin, **cls._options)

    @staticmethod
    def why_not(attention: Any) -> str | None:
        names = inspect.unwrap(type(attention).forward).__code__.co_names
        others = [name for name in names if "rotary_pos_emb" in name and name != _ROPE]
        return f"its forward also calls {others[0]}" if others else None


class FastInterleavedRoPE(FastRoPE):
    """`FastRoPE` for RoPE that rotates pairs of even and odd elements (ERNIE 4.5)."""

    _options = {"interleaved": True}


class FastSinkAttention(FastRoPE):
    """`GptOssAttention` with its variant of RoPE in one kernel. Its attention is `attend_with_sinks`."""

    probed = True
    stands_for = ("forward", "apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward")
    _options = {"half": True}

    @staticmethod
    def why_not(attention: Any) -> str | None:
        chosen = attention.config._attn_implementation
        return None if chosen == SINKS else f"attn_implementation={chosen!r} is configured"
