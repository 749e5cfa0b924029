"""Gradients of the experts' weights and biases: sums over each expert's rows.

    grouped_wgrad:  dW_e = Σ_s a_s ⊗ b_s   over the rows s of expert e
    grouped_sum:    db_e = Σ_s a_s

Either operand of the product may be read through the token index instead of from a permuted copy. An expert without
rows gets zeros: its gradient is written, not skipped.
"""

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.grouped_gemm import dot_precision, segments
from expertmesh.kernels.grouping import Grouping


def grouped_wgrad(
    a: torch.Tensor, b: torch.Tensor, group: Grouping, *, gather_a: bool = False, gather_b: bool = False
) -> torch.Tensor:
    """dW [E, M, N] = Σ over each expert's rows of a_s [M] ⊗ b_s [N].

    a: [S, M] in sorted order, or [T, M] with `gather_a`; b likewise. Sums in float32, result in a's dtype.
    """
    if use_triton(a):
        return _grouped_wgrad_triton(a, b, group, gather_a, gather_b)
    return grouped_wgrad_reference(a, b, group, gather_a=gather_a, gather_b=gather_b)


def grouped_wgrad_reference(
    a: torch.Tensor, b: torch.Tensor, group: Grouping, *, gather_a: bool = False, gather_b: bool = False
) -> torch.Tensor:
    """The specification of `grouped_wgrad`: one product per expert, or `F.grouped_mm` on a GPU without Triton."""
    a_SM = a[group.token_S.long()] if gather_a else a
    b_SN = b[group.token_S.long()] if gather_b else b
    if a.is_cuda:
        return F.grouped_mm(a_SM.t(), b_SN, offs=group.offsets_E)
    dw_EMN = a.new_zeros(group.offsets_E.numel(), a.shape[1], b.shape[1])
    for expert, (begin, end) in segments(group):
        torch.mm(a_SM[begin:end].t(), b_SN[begin:end], out=dw_EMN[expert])
    return dw_EMN


def grouped_sum(a_SN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """db [E, N]: the sum of a [S, N] over each expert's rows, in float32, returned in a's dtype."""
    if use_triton(a_SN):
        num_experts, num_columns = group.offsets_E.numel(), a_SN.shape[1]
        sums_EN = a_SN.new_empty(num_experts, num_columns)
        grid = (num_experts, triton.cdiv(num_columns, 64))
        _grouped_sum_kernel[grid](a_SN, sums_EN, group.offsets_E, num_columns, BR=64, BN=64)
        return sums_EN
    return grouped_sum_reference(a_SN, group)


def grouped_sum_reference(a_SN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """The specification of `grouped_sum`: differences of the running sum at the experts' ends."""
    running = F.pad(a_SN.double().cumsum(0), (0, 0, 1, 0))
    ends_E = group.offsets_E.long()
    begins_E = F.pad(ends_E[:-1], (1, 0))
    return (running[ends_E] - running[begins_E]).to(a_SN.dtype)


def wgrad_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile of dW and of the rows contracted at a time, warps and pipeline stages."""
    if dtype == torch.float32:
        return dict(BM=64, BN=64, BK=32, num_warps=4, num_stages=2)
    return dict(BM=128, BN=128, BK=64, num_warps=4, num_stages=3)


def _grouped_wgrad_triton(
    a: torch.Tensor, b: torch.Tensor, group: Grouping, gather_a: bool, gather_b: bool
) -> torch.Tensor:
    assert a.stride(1) == 1 and b.stride(1) == 1
    num_experts, num_m, num_n = group.offsets_E.numel(), a.shape[1], b.shape[1]
    dw_EMN = a.new_empty(num_experts, num_m, num_n)
    config = wgrad_config(a.dtype)
    grid = (num_experts * triton.cdiv(num_m, config["BM"]) * triton.cdiv(num_n, config["BN"]),)
    _grouped_wgrad_kernel[grid](
        a,
        b,
        group.token_S,
        dw_EMN,
        group.offsets_E,
        num_m,
        num_n,
        a.stride(0),
        b.stride(0),
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        PRECISION=dot_precision(a.dtype),
        EVEN=num_m % config["BM"] == 0 and num_n % config["BN"] == 0,
        **config,
    )
    return dw_EMN


@triton.jit
def _grouped_wgrad_kernel(
    a,
    b,
    token,
    dw,
    offsets,
    num_m,
    num_n,
    stride_a,
    stride_b,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(num_m, BM), tl.cdiv(num_n, BN)
    expert, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    end = tl.load(offsets + expert)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    m = (tile // tiles_n) * BM + tl.arange(0, BM)
    n = (tile % tiles_n) * BN + tl.arange(0, BN)
    a_columns, b_columns = a + m[None, :], b + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        row = start + tl.arange(0, BK)
        inside = row < end
        row_a = row
        row_b = row
        if GATHER_A:
            row_a = tl.load(token + row, mask=inside, other=0)
        if GATHER_B:
            row_b = tl.load(token + row, mask=inside, other=0)
        a_mask = inside[:, None]
        b_mask = inside[:, None]
        if not EVEN:
            a_mask &= (m < num_m)[None, :]
            b_mask &= (n < num_n)[None, :]
        a_tile = tl.load(a_columns + row_a.to(tl.int64)[:, None] * stride_a, mask=a_mask, other=0.0)
        b_tile = tl.load(b_columns + row_b.to(tl.int64)[:, None] * stride_b, mask=b_mask, other=0.0)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision=PRECISION)
    at = dw + expert.to(tl.int64) * num_m * num_n + m.to(tl.int64)[:, None] * num_n + n[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(m < num_m)[:, None] & (n < num_n)[None, :])


@triton.jit
def _grouped_sum_kernel(a, sums, offsets, num_columns, BR: tl.constexpr, BN: tl.constexpr):
    expert = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    end = tl.load(offsets + expert)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(begin, end, BR):
        row = start + tl.arange(0, BR)
        mask = (row < end)[:, None] & (column < num_columns)[None, :]
        at = a + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        acc += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), axis=0)
    tl.store(sums + expert * num_columns + column, acc.to(sums.dtype.element_ty), mask=column < num_columns)
