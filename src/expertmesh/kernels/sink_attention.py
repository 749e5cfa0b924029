"""Causal attention with sinks: one learned logit per head joins the softmax, so a query may attend to nothing.

    p_rn = exp(s_rn) / (exp(sink_h) + Σ_n exp(s_rn)),   s = scale · q kᵀ,   out = p v          (GPT-OSS)

A query r sees the keys from `low(r)` to r; documents packed into a row and a sliding window both only raise that bound,
which never falls from one query to the next. So of the key blocks of a query block, the first may be cut by the bound,
the last by r, and those between need no mask: blocks outside are never touched, and no mask exists in memory.

FlashAttention-2's scheme: an online softmax that begins with the sink (so no row is ever empty), the base-2 logarithm
of its sum is kept; backward one kernel over query blocks (dq, the sinks' gradient, and δ = Σ dout·out) and one over
key blocks (dk, dv, summed over the query heads of a key head). No atomics: equal inputs give equal bits.
Without window and padding flash-attn-4 is faster, where it takes them (flash_attention.py).

Letters: B batch, S row, N heads (NQ of queries, NK of keys), D head width, M and N blocks of queries and keys.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import triton, use_triton
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Bounds
from expertmesh.kernels.grouped_gemm import by_descriptor, dot_precision, tiles_of
from expertmesh.kernels.sink_kernels import sink_over_keys, sink_over_queries


class Padding(NamedTuple):
    """Keys that no query sees: `seen` [B, S] is False there; `whole` [B] int32: how many come before the first."""

    seen: torch.Tensor
    whole: torch.Tensor

    def contiguous(self) -> "Padding":
        """Itself: `generate` asks this of every mask."""
        return self


def padding_of(mask: torch.Tensor) -> Padding:
    """`Padding` from a mask [B, S] that is 0 there; nothing waits for the device."""
    seen = mask.bool()
    # the first of the largest: 0 where all are equal
    whole = torch.where(seen.all(1), seen.shape[1], (~seen).int().argmax(1))
    return Padding(seen.contiguous(), whole.int())


def takes(query: torch.Tensor) -> bool:
    """Whether the kernels have this head width."""
    return query.shape[-1] in (16, 32, 64, 128)


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    window: int | None = None,
    documents: Bounds | None = None,
    padding: Padding | None = None,
) -> torch.Tensor:
    """[B, S, NQ, D] in query's dtype; differentiable in query, key, value and sinks. Must equal the eager attention of
    Transformers' GptOssAttention with a causal mask.

    query: [B, NQ, S, D], key and value: [B, NK, S, D], no copy if they are views of [B, S, N, D]; sinks: [NQ].
    window: a query sees itself and the window - 1 tokens before it. documents: and none before its own document.
    padding: nobody sees those keys; a query that sees none gives 0.
    """
    start, end, given = documents or (None, None, None)
    plain = window is None and padding is None and (start is None or given is not None)
    if plain and flash_attention.takes(query, key, value):
        return flash_attention.flash_attention(query, key, value, scale, sinks, given)
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    if use_triton(query):
        return _apply_kernels(query, key, value, sinks, start, end, *(padding or (None, None)), scale, window)
    seen = padding.seen if padding is not None else None
    return sink_attention_reference(query, key, value, sinks, scale, window, start, seen)


def sink_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    window: int | None = None,
    start: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification, for [B, S, N, D] tensors: scores, mask, softmax with the sink as one more column."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    mask = visible(query.shape[1], query.device, window, start, seen)[:, None]
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
    scores = torch.einsum("brhd,bnhd->bhrn", query * scale, key) + bias
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhrn,bnhd->brhd", weights, value).contiguous()


def visible(
    length: int, device: torch.device, window: int | None, start: torch.Tensor | None, seen: torch.Tensor | None
) -> torch.Tensor:
    """[B or 1, S, S]: True where a query (second dimension) sees a key."""
    token = torch.arange(length, device=device)
    row, key = token[None, :, None], token[None, None, :]
    mask = key <= row
    if window is not None:
        mask = mask & (key > row - window)
    if start is not None:
        mask = mask & (key >= start[:, :, None])
    return mask if seen is None else mask & seen.bool()[:, None, :]


#: (pass, head width up to): rows of queries and of keys in a tile, warps, pipeline stages; and those with a window
TUNING: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("forward", 64): ((64, 64, 4, 2), (64, 64, 4, 2)),
    ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 2)),
    ("dq", 64): ((128, 64, 8, 3), (128, 64, 8, 2)),
    ("dq", 128): ((128, 64, 8, 2), (64, 64, 4, 2)),
    ("dkdv", 64): ((64, 128, 8, 3), (64, 128, 8, 2)),
    ("dkdv", 128): ((64, 128, 8, 2), (64, 64, 4, 2)),
}
_EXACT = 32, 32, 4, 1  # float32


def _config(name: str, x: torch.Tensor, window: int | None) -> dict[str, Any]:
    """Everything a kernel is compiled for, apart from heads. SPLIT: most of its blocks need no mask."""
    width = x.shape[-1]
    sizes = _EXACT if x.dtype == torch.float32 else TUNING[name, 64 if width <= 64 else 128][window is not None]
    tuning = dict(zip(("BM", "BN", "num_warps", "num_stages"), sizes, strict=True))
    split = window is None or window >= 4 * max(sizes[:2])
    reads = dict(DESCRIPTOR=by_descriptor(x.device), PRECISION=dot_precision(x.dtype))
    return dict(D=width, WINDOW=window or 0, SPLIT=split, **reads, **tuning)


def _tiles(x_BSND: torch.Tensor, rows: int) -> Any:
    """What `matrix_tile` reads [rows, D] of one head through."""
    B, S, N, D = x_BSND.shape
    return tiles_of(x_BSND.view(B * S, N * D), rows, D)


def _launch_over_keys(
    name: str, inputs: tuple, gradients: tuple, scale: float, window: int | None, flags: dict
) -> None:
    """inputs: what both directions read, and out and lse; gradients: dout, and what the backward makes."""
    q, k, v, *others = inputs
    B, S, NQ, _ = q.shape
    config = _config(name, q, window)
    sink_over_keys[B * NQ, triton.cdiv(S, config["BM"])](
        q, _tiles(k, config["BN"]), _tiles(v, config["BN"]), *others, *gradients, B * S, S, scale,
        BACKWARD=name == "dq", **flags, **config,
    )  # fmt: skip


class _SinkAttention(torch.autograd.Function):
    """query, key, value [B, S, N, D] contiguous, sinks [NQ], bounds and padding or None → out [B, S, NQ, D]."""

    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, start, end, seen, whole, scale: float, window: int | None) -> torch.Tensor:
        B, S, NQ, _ = q.shape
        assert q.numel() < 2**31, "elements are counted in 32 bits"
        if window is not None and window >= S:
            window = None
        seen = None if seen is None else seen.view(torch.int8)
        out, lse = torch.empty_like(q), q.new_empty(B, NQ, S, dtype=torch.float32)
        flags = dict(NQ=NQ, NK=k.shape[2], PACKED=start is not None, PADDED=seen is not None)
        start, end, seen, whole = (
            q if x is None else x for x in (start, end, seen, whole)
        )  # some pointer, which nothing reads
        inputs = q, k, v, sinks, start, seen, whole, out, lse
        _launch_over_keys("forward", inputs, (None, None, None, None), scale, window, flags)
        ctx.save_for_backward(*inputs, end)
        ctx.flags, ctx.scale, ctx.window = flags, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, end = ctx.saved_tensors
        q, k, v, sinks, _, seen, _, _, lse = inputs
        B, S, NQ, _ = q.shape
        dout, flags = dout.contiguous(), ctx.flags
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        config = _config("dq", q, ctx.window)
        dsinks = lse.new_empty(triton.cdiv(S, config["BM"]) * B, NQ)
        _launch_over_keys("dq", inputs, (dout, delta, dq, dsinks), ctx.scale, ctx.window, flags)
        config = _config("dkdv", q, ctx.window)
        sink_over_queries[B * flags["NK"], triton.cdiv(S, config["BN"])](
            _tiles(q, config["BM"]), _tiles(dout, config["BM"]), k, v, end, seen, lse, delta, dk, dv, B * S, S,
            ctx.scale, **flags, **config,
        )  # fmt: skip
        return dq, dk, dv, dsinks.sum(0).to(sinks.dtype), *[None] * 6


_apply_kernels = torch.compiler.disable(_SinkAttention.apply)  # Dynamo cannot trace tensor descriptors
