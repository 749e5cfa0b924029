"""Several documents in one row: representation of their boundaries, and causal attention within each.

Collators give the boundaries as offsets (`cu_seqlens`), as document numbers (`seq_idx`), or as positions that restart
at 0. The model turns all of them into numbers [B, S] that differ between neighbouring documents. Only `per_document`
synchronizes with the device.

PyTorch's FlashAttention kernel takes the boundaries, so its time and memory grow with the documents' lengths. An
equivalent mask grows with the row's length squared, and SDPA has no fast kernel for it.

Letters: B batch, S row length, T = B·S tokens, N heads (of queries or of keys), D head width.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from expertmesh.backends import VARLEN_GQA, matmul_dtype


def document_numbers(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return document numbers [B, S] from cu_seqlens [documents + 1]: the first token of each document, and B·S."""
    token = torch.arange(rows * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(token, cu_seqlens, right=True).view(rows, length)


def document_starts(number_BS: torch.Tensor) -> torch.Tensor:
    """Return [B, S] int32: for each token the index within its row of the first token of its document."""
    token_S = torch.arange(number_BS.shape[1], device=number_BS.device, dtype=torch.int32)
    is_start = F.pad(number_BS[:, 1:] != number_BS[:, :-1], (1, 0), value=True)
    return torch.where(is_start, token_S, 0).cummax(dim=1).values


def per_document(function: Callable[..., torch.Tensor], start_BS: torch.Tensor, *inputs: Any) -> torch.Tensor:
    """Call `function` on each document separately and concatenate to [B, S, ...]. Synchronizes with a GPU. start: the
    result of `document_starts`. inputs: tensors [B, S, ...], passed as [1, length, ...], or None.
    """
    B, S = start_BS.shape
    first_T = (start_BS + S * torch.arange(B, device=start_BS.device)[:, None]).flatten()
    lengths = first_T.unique_consecutive(return_counts=True)[1].tolist()
    parts = [repeat(None) if x is None else x.flatten(0, 1)[None].split(lengths, dim=1) for x in inputs]
    out = torch.cat([function(*part) for part in zip(*parts, strict=False)], dim=1)
    return out.view(B, S, *out.shape[2:])


class Documents(NamedTuple):
    """cu_seqlens: int32 [documents + 1], the first of B·S tokens of each document, and B·S. max_length: the longest."""

    cu_seqlens: torch.Tensor
    max_length: int


def supports(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel supports these head widths: multiples of 8 up to 256, values at most as wide as queries."""
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
    """Return causal attention within documents, [B, S, Nq, Dv] in the inputs' dtype, or in autocast's.

    query: [B, Nq, S, D]; key: [B, Nk, S, D]; value: [B, Nk, S, Dv]. Views of [B, S, N, D] are not copied. CUDA needs
    float16 or bfloat16. cu_seqlens and max_length: as in `Documents`. scale: None means 1 / sqrt(D).
    """
    B, _, S, D = query.shape
    padding, dtype = D - value.shape[-1], matmul_dtype(query)
    query, key, value = (x.to(dtype).transpose(1, 2).reshape(B * S, -1, x.shape[-1]) for x in (query, key, value))
    value = F.pad(value, (0, padding)) if padding else value
    out: Any  # its annotated return type includes tuples
    if query.is_cuda:
        lengths = cu_seqlens, cu_seqlens, max_length, max_length
        out = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0), **VARLEN_GQA)
    else:
        out = varlen_attention_reference(query, key, value, cu_seqlens, scale)
    return out.view(B, S, -1, D)[..., : D - padding]


def varlen_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """The specification, and the CPU path, for [T, N, D] tensors: SDPA on each document separately."""
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in parts]
    return torch.cat(outs, dim=2)[0].transpose(0, 1).contiguous()


def document_mask(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return the mask [B, 1, S, S] of the same attention: True where a query may attend to a key."""
    document = document_numbers(cu_seqlens, rows, length)[:, None]
    return (document[..., :, None] == document[..., None, :]).tril()
