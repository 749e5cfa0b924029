"""What adapters of low rank add to a product of the experts: y_s = x_s · W_e + u_s · B_e, where u_s = x_s · A_eᵀ.

A [E, R, K] and B [E, R, N] have the wide side last, and R is a multiple of 16. u comes from thin.py; u · B is added
where the GEMM of x · W has its sums in registers, so that it costs no pass over y.
"""

from typing import NamedTuple

import torch

from expertmesh.backends import tl, triton


class LowRank(NamedTuple):
    """What adapters add to a product: u_s · B_e, u [S, R] and B [E, R, N] contiguous, R a multiple of 16."""

    u_SR: torch.Tensor
    b_ERN: torch.Tensor


def rank_of(low: LowRank | None) -> int:
    """R, 0 without adapters."""
    if low is None:
        return 0
    assert low.u_SR.is_contiguous() and low.b_ERN.is_contiguous() and low.b_ERN.shape[1] % 16 == 0
    return low.b_ERN.shape[1]


@triton.jit
def add_low_rank(
    acc, u, b, expert, row, inside, column, width, num_columns, RANK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc [BM, BN] plus some rows of u [S, RANK] times columns of an expert's B [RANK, num_columns], `width` of them
    from some one on."""
    for first in tl.static_range(0, RANK, 16):  # a second loop would keep the caller's from being flattened
        inner = first + tl.arange(0, 16)
        rows = tl.load(u + row.to(tl.int64)[:, None] * RANK + inner[None, :], mask=inside[:, None], other=0.0)
        at = b + (expert * RANK + inner).to(tl.int64)[:, None] * num_columns + column[None, :]
        columns = tl.load(at, mask=(column < width)[None, :], other=0.0)
        acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
    return acc
