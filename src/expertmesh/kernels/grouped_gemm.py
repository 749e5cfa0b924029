"""Grouped GEMM over rows sorted by expert: y_s = a_s · W_e(s) (+ bias), and the pieces its relatives share.

Three files hold the experts' matrix products. This one multiplies rows that already stand in sorted order (the
down-projection, and the gradient of the up-projection's input). `grouped_act` gathers its rows by index and carries the
activation or its gradient in the epilogue. `grouped_wgrad` contracts over rows and makes the weights' gradients.

Every Triton program computes one row tile of `Grouping.tiles` times one column tile; a tile never spans two experts,
and unused tiles return at once, so the grid needs no number from the device. Weights are read through their strides:
the transposed and the plain layout of Transformers need no copy.
"""

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.grouping import Grouping


def grouped_gemm(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """y [S, N]: row s of a [S, K] times the weights [E, K, N] (any strides) of its expert, plus its bias [E, N].

    Rows behind the last expert's are not written on the Triton path: no reader of a `Grouping` looks at them.
    """
    if use_triton(a_SK):
        return _grouped_gemm_triton(a_SK, w_EKN, group, bias_EN)
    return grouped_gemm_reference(a_SK, w_EKN, group, bias_EN)


def grouped_gemm_reference(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification of `grouped_gemm`: one matrix product per expert, or `F.grouped_mm` on a GPU without Triton."""
    if a_SK.is_cuda:
        y_SN = F.grouped_mm(a_SK, w_EKN, offs=group.offsets_E)
        return y_SN if bias_EN is None else y_SN + rows_of_experts(bias_EN, group)
    y_SN = a_SK.new_zeros(a_SK.shape[0], w_EKN.shape[2])
    for expert, (begin, end) in segments(group):
        torch.mm(a_SK[begin:end], w_EKN[expert], out=y_SN[begin:end])
        if bias_EN is not None:
            y_SN[begin:end] += bias_EN[expert]
    return y_SN


def segments(group: Grouping) -> list[tuple[int, tuple[int, int]]]:
    """(expert, (first row, end row)) of every expert that has rows. Reads the offsets: for the CPU path only."""
    ends = group.offsets_E.tolist()
    return [(e, (begin, end)) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > begin]


def rows_of_experts(bias_EN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """bias [E, N] repeated to the sorted rows [S, N], without asking the device for counts."""
    row = torch.arange(group.slot_S.numel(), device=bias_EN.device, dtype=torch.int32)
    expert_S = torch.searchsorted(group.offsets_E, row, right=True).clamp_(max=bias_EN.shape[0] - 1)
    return bias_EN[expert_S]


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user allowed TF32, as for torch.matmul."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def tile_config(dtype: torch.dtype, block_rows: int) -> dict[str, int]:
    """Column and contraction tile, warps and pipeline stages of the row-tile kernels."""
    if dtype == torch.float32:
        return dict(BN=64, BK=32, num_warps=4, num_stages=2)
    if block_rows == 128:
        return dict(BN=256, BK=64, num_warps=8, num_stages=3)
    return dict(BN=128, BK=64, num_warps=4, num_stages=3)


def _grouped_gemm_triton(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None
) -> torch.Tensor:
    assert group.tiles is not None and a_SK.stride(1) == 1
    tile_expert, tile_row = group.tiles
    num_columns, num_inner = w_EKN.shape[2], w_EKN.shape[1]
    y_SN = a_SK.new_empty(a_SK.shape[0], num_columns)
    config = tile_config(a_SK.dtype, group.block)
    grid = (tile_expert.numel() * triton.cdiv(num_columns, config["BN"]),)
    _grouped_gemm_kernel[grid](
        a_SK,
        w_EKN,
        bias_EN,
        y_SN,
        tile_expert,
        tile_row,
        group.offsets_E,
        num_columns,
        num_inner,
        a_SK.stride(0),
        *w_EKN.stride(),
        BM=group.block,
        PRECISION=dot_precision(a_SK.dtype),
        HAS_BIAS=bias_EN is not None,
        EVEN=num_inner % config["BK"] == 0 and num_columns % config["BN"] == 0,
        **config,
    )
    return y_SN


@triton.jit
def accumulate(
    acc,
    a_rows,
    b_columns,
    column_mask,
    num_inner,
    stride_bk,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BM, BN] += A·B over the inner dimension; a_rows [BM, 1] and b_columns [1, BN] point at inner index 0.

    EVEN: inner dimension and columns are multiples of the tile, so no load needs a mask.
    """
    inner = tl.arange(0, BK)
    for start in range(0, num_inner, BK):
        k = start + inner
        if EVEN:
            a = tl.load(a_rows + k[None, :])
            b = tl.load(b_columns + k[:, None] * stride_bk)
        else:
            inside = k < num_inner
            a = tl.load(a_rows + k[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(b_columns + k[:, None] * stride_bk, mask=inside[:, None] & column_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _grouped_gemm_kernel(
    a,
    w,
    bias,
    y,
    tile_expert,
    tile_row,
    offsets,
    num_columns,
    num_inner,
    stride_am,
    stride_we,
    stride_wk,
    stride_wn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    column_tiles = tl.cdiv(num_columns, BN)
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    begin, end = tl.load(tile_row + tile), tl.load(offsets + expert)
    row = begin + tl.arange(0, BM)
    column = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    column_mask = (column < num_columns)[None, :]
    # rows past the end read a valid neighbour instead of a mask; they are not stored
    a_rows = a + tl.minimum(row, end - 1).to(tl.int64)[:, None] * stride_am
    w_columns = w + expert.to(tl.int64) * stride_we + column[None, :] * stride_wn
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, a_rows, w_columns, column_mask, num_inner, stride_wk, BK, EVEN, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + expert * num_columns + column, mask=column < num_columns, other=0.0).to(tl.float32)[
            None, :
        ]
    mask = (row < end)[:, None] & column_mask
    tl.store(y + row.to(tl.int64)[:, None] * num_columns + column[None, :], acc.to(y.dtype.element_ty), mask=mask)
