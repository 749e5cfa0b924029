"""Documents that lie one behind the other in a row: how they are told, and what kernels want to know about them.

Collators say where documents begin (`cu_seqlens`), number them (`seq_idx`), or give positions that begin anew with
each. All become numbers here, [B, S]: any that differ between neighbouring documents. Nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


def document_of(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Numbers [B, S] from where each document begins among the B·S tokens, and B·S: [documents + 1]."""
    token = torch.arange(rows * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(token, cu_seqlens, right=True).view(rows, length)


def document_starts(number_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] int32: the index in its row of the token at which each token's document starts."""
    token_S = torch.arange(number_BS.shape[1], device=number_BS.device, dtype=torch.int32)
    is_start = F.pad(number_BS[:, 1:] != number_BS[:, :-1], (1, 0), value=True)
    return torch.where(is_start, token_S, 0).cummax(dim=1).values


class Documents(NamedTuple):
    """Where documents begin among the B·S tokens, and B·S: [documents + 1] int32; and the longest one's length."""

    cu_seqlens: torch.Tensor
    max_length: int


class Bounds(NamedTuple):
    """Where each token's document begins and ends in its row: [B, S] int32 each; and the lengths, if given."""

    start: torch.Tensor
    end: torch.Tensor
    given: Documents | None = None


def document_bounds(number_BS: torch.Tensor) -> Bounds:
    """The end is where, in the row reversed, the document starts."""
    return Bounds(document_starts(number_BS), number_BS.shape[1] - document_starts(number_BS.flip(1)).flip(1))
