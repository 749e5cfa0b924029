"""Causal attention with sinks: each head has a learned logit in its softmax, so a query may attend to nothing.

    p_rn = exp(s_rn) / (exp(sink_h) + Σ_n exp(s_rn)),   s = scale · q kᵀ,   out = p v          (GPT-OSS)

A query r attends to the keys n ≤ r of its document, with a window W only to those with n > r - W. The first
implementation that supports the inputs runs:

    flash-attn-4 (flash_attention.py)    training on Hopper; supports sinks itself
    PyTorch's FlashAttention-2           CUDA from Ampere on, 16 bits, head widths in steps of 8 up to 256; corrected
    the reference                        everything else; materializes all scores [B, NQ, S, S]

FlashAttention-2 returns out and lse = log Σ_n exp(s_rn) of a softmax without the sink. The sink is one more key whose
value is zero, so the results with it are

    lse' = log(exp(lse) + exp(sink)),   out' = out · exp(lse - lse')

FlashAttention's backward needs nothing else of the softmax: from lse' and out' it gets p = exp(s - lse') and
δ = Σ_d dout · out' of attention with sinks, hence its dq, dk and dv. As the sink's value is zero, its ds is p (0 - δ):

    dsink_h = - Σ_r exp(sink_h - lse'_r) δ_r

Letters: B batch, S sequence, T = B·S tokens, N heads (NQ of queries, NK of keys), D head width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_mask, supports


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Return attention [B, S, NQ, D] in query's dtype. Differentiable in query, key, value and sinks. Must equal eager
    attention of Transformers' GptOssAttention with a causal mask.

    query: [B, NQ, S, D], key and value: [B, NK, S, D], not copied if they are views of [B, S, N, D]; sinks: [NQ].
    window: a query attends to itself and the window - 1 tokens before it. documents: no attention across documents.
    """
    if flash_attention.supports(query, key, value):
        return flash_attention.flash_attention(query, key, value, scale, sinks, documents, window=window)
    if _is_for_flash_attention_2(query, value):
        B, _, S, _ = query.shape
        if documents is None:
            documents = Documents(torch.arange(0, (B + 1) * S, S, device=query.device, dtype=torch.int32), S)
        begins, longest = documents
        options: dict[str, Any] = {"dropout_p": 0.0, "scale": scale, "is_causal": window is None}
        options |= dict.fromkeys(("cum_seq_q", "cum_seq_k"), begins) | dict.fromkeys(("max_q", "max_k"), longest)
        options |= {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        return _with_sinks(*tokens, sinks, options).unflatten(0, (B, S))
    if query.is_cuda:
        backends.warn_once(
            "attention with sinks holds all scores of a layer in memory. Memory-efficient attention needs bfloat16 or "
            "float16 on Ampere or newer, and a head width that is a multiple of 8 up to 256."
        )
    return sink_attention_reference(query, key, value, sinks, scale, window, documents)


def _is_for_flash_attention_2(query: torch.Tensor, value: torch.Tensor) -> bool:
    return query.is_cuda and not backends.in_fullgraph() and backends.has_varlen(query) and supports(query, value)


def sink_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Reference of `sink_attention`: scores, mask, and softmax with the sink as one more column."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    masked = ~visible(query, window, documents)
    scores = torch.einsum("bhrd,bhnd->bhrn", query * scale, key).masked_fill(masked, float("-inf"))
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhrn,bhnd->brhd", weights, value).contiguous()


def visible(query: torch.Tensor, window: int | None, documents: Documents | None) -> torch.Tensor:
    """Return the mask [B or 1, 1, S, S]: True where a query (dimension 2) attends to a key. query: [B, NQ, S, D]."""
    S = query.shape[2]
    mask = torch.ones(1, 1, S, S, dtype=torch.bool, device=query.device).tril()
    if documents is not None:
        mask = document_mask(documents.cu_seqlens, len(query), S)
    return mask if window is None else mask.triu(1 - window)


class _WithSinks(torch.autograd.Function):
    """query [T, NQ, D], key and value [T, NK, D], sinks [NQ], options of both kernels → out [T, NQ, D]."""

    @staticmethod
    def forward(ctx: Any, query, key, value, sinks, options: dict[str, Any]) -> torch.Tensor:
        out, lse = flash_forward(query, key, value, options)
        sink = sinks.to(lse.dtype)[:, None]
        out *= (lse - sink).sigmoid().t()[..., None]  # exp(lse - lse')
        ctx.save_for_backward(query, key, value, out, torch.logaddexp(lse, sink), sinks)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        dsinks = None
        if ctx.needs_input_grad[3]:
            delta = (dout * out).sum(-1, dtype=lse.dtype)
            dsinks = -((sinks.to(lse.dtype) - lse.t()).exp() * delta).sum(0).to(sinks.dtype)
        return *flash_backward(dout, query, key, value, out, lse, ctx.options), dsinks, None


_with_sinks = torch.compiler.disable(_WithSinks.apply)


def flash_forward(query, key, value, options: dict[str, Any]) -> Any:
    """Return out [T, NQ, D] and lse [NQ, T] in float32."""
    return torch.ops.aten._flash_attention_forward(query, key, value, return_debug_mask=False, **options)[:2]


def flash_backward(dout, query, key, value, out, lse, options: dict[str, Any]) -> Any:
    """Return the gradients of query, key and value; deterministic under `torch.use_deterministic_algorithms`."""
    dropout = dict.fromkeys(("rng_state", "unused"), lse.new_empty(0))
    return torch.ops.aten._flash_attention_backward(dout, query, key, value, out, lse, **dropout, **options)
