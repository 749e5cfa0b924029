"""Documents that lie one behind the other in a row: how they are told, and causal attention within each of them.

Collators say where documents begin (`cu_seqlens`), number them (`seq_idx`), or give positions that begin anew with
each. All become numbers here, [B, S]: any that differ between neighbouring documents. Nothing waits for the device.

PyTorch's FlashAttention kernel takes the documents' boundaries, so what is computed and kept grows with the documents'
lengths; the mask that stands for the same thing grows with the square of the row, and SDPA has no fast kernel for it.

Letters: B batch, S row, T = B·S tokens, N heads (of queries or of keys), D head width.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from expertmesh.backends import VARLEN_GQA, matmul_dtype


def document_numbers(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Numbers [B, S] from where each document begins among the B·S tokens, and B·S: [documents + 1]."""
    token = torch.arange(rows * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(token, cu_seqlens, right=True).view(rows, length)


def document_starts(number_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] int32: the index in its row of the token at which each token's document starts."""
    token_S = torch.arange(number_BS.shape[1], device=number_BS.device, dtype=torch.int32)
    is_start = F.pad(number_BS[:, 1:] != number_BS[:, :-1], (1, 0), value=True)
    return torch.where(is_start, token_S, 0).cummax(dim=1).values


def per_document(function: Callable[..., torch.Tensor], start_BS: torch.Tensor, *inputs: Any) -> torch.Tensor:
    """`function` of each document by itself, put together to [B, S, ...]. On a GPU the host waits.

    start: as of `document_starts`; inputs: [B, S, ...], of which a function gets [1, length, ...], or None.
    """
    B, S = start_BS.shape
    first_T = (start_BS + S * torch.arange(B, device=start_BS.device)[:, None]).flatten()
    lengths = first_T.unique_consecutive(return_counts=True)[1].tolist()
    parts = [repeat(None) if x is None else x.flatten(0, 1)[None].split(lengths, dim=1) for x in inputs]
    out = torch.cat([function(*part) for part in zip(*parts, strict=False)], dim=1)
    return out.view(B, S, *out.shape[2:])


class Documents(NamedTuple):
    """Where documents begin among the B·S tokens, and B·S: [documents + 1] int32; and the longest one's length."""

    cu_seqlens: torch.Tensor
    max_length: int


def supports(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel has these head widths: multiples of 8 up to 256, values at most as wide as queries."""
    width = query.shape[-1]
    return width % 8 == 0 and value.shape[-1] <= width <= 256


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    scale: float | None = None,
) -> torch.Tensor:
    """[B, S, Nq, Dv] in the inputs' dtype; scale None is 1 / sqrt(D). On CUDA float16 or bfloat16, also by autocast.

    query: [B, Nq, S, D], key: [B, Nk, S, D] and value: [B, Nk, S, Dv], no copy if they are views of [B, S, N, D];
    cu_seqlens: [documents + 1] int32, where each begins among the T tokens, and T; max_length: that of the longest.
    """
    B, _, S, D = query.shape
    missing, dtype = D - value.shape[-1], matmul_dtype(query)
    query, key, value = (x.to(dtype).transpose(1, 2).reshape(B * S, -1, x.shape[-1]) for x in (query, key, value))
    value = F.pad(value, (0, missing)) if missing else value
    out: Any  # torch's function returns a tuple if asked for more
    if query.is_cuda:
        lengths = cu_seqlens, cu_seqlens, max_length, max_length
        out = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0), **VARLEN_GQA)
    else:
        out = varlen_attention_reference(query, key, value, cu_seqlens, scale)
    return out.view(B, S, -1, D)[..., : D - missing]


def varlen_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """The specification, for [T, N, D] tensors, and what a CPU runs: SDPA within one document after the other."""
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in parts]
    return torch.cat(outs, dim=2)[0].transpose(0, 1).contiguous()


def document_mask(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The same attention as a mask [B, 1, S, S]: True where a query sees a key."""
    document = document_numbers(cu_seqlens, rows, length)[:, None]
    return (document[..., :, None] == document[..., None, :]).tril()
