"""Gradients of the experts' weights and biases: sums over each expert's rows.

    grouped_wgrad:  dW_e = scale · Σ_s g_t(s) ⊗ c_s   over the rows s of expert e
    grouped_sum:    db_e = Σ_s a_s

One operand of the product is read through the token index instead of from a permuted copy. An expert without rows gets
zeros: its gradient is written, not skipped.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton
from expertmesh.kernels import quack
from expertmesh.kernels.grouped_gemm import (
    THIN,
    by_descriptor,
    dot_precision,
    matrix_tile,
    tile_config,
    tiles_of,
    wide,
)
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import launched


def grouped_wgrad(
    g_TG: torch.Tensor,
    c_SC: torch.Tensor,
    group: Grouping,
    w_EGC: torch.Tensor,
    scale: float = 1.0,
    own: bool = False,
) -> torch.Tensor:
    """dW [E, G, C] = scale · Σ over each expert's rows of g_t(s) [G] ⊗ c_s [C], for weights w [E, G, C].

    g: [T, G], one row per token; c: [S, C] in sorted order, finite up to the end of the last expert's last row tile.
    Sums in float32, result in g's dtype and in the memory layout of w, plain or transposed, so that autograd need not
    copy. own: never by quack. Without tiles it is the specification: one product per expert.
    """
    gathered_first = w_EGC.stride(2) == 1
    if group.tiles is None:
        g_SG = g_TG.index_select(0, group.token_S)
        a, b = (g_SG, c_SC) if gathered_first else (c_SC, g_SG)
        dw = a.new_empty(len(group.bounds) - 1, a.shape[1], b.shape[1])
        for expert, (begin, end) in enumerate(pairwise(group.bounds.tolist())):  # no rows: the product is zeros
            torch.mm(a[begin:end].t(), b[begin:end], out=dw[expert])
        dw = dw if scale == 1 else dw.mul_(scale)
        return dw if gathered_first else dw.transpose(1, 2)
    if not own and quack.takes(c_SC, w_EGC):
        return quack.wgrad(g_TG, c_SC, group, w_EGC, scale)
    num_experts, num_g, num_c = w_EGC.shape
    assert g_TG.stride(1) == 1
    dw = g_TG.new_empty(num_experts, *((num_g, num_c) if gathered_first else (num_c, num_g)))
    exact = g_TG.dtype == torch.float32
    thin = num_c if num_c <= THIN and not exact else 0
    config = tile_config(g_TG, 128 if wide(g_TG.device) else 64, thin=thin)
    config |= {"BG": 64 if exact else 128, "BC": config.pop("BN")}
    config["BK"] = min(config["BK"], group.block)  # divides a row tile: behind its end nobody promises finite numbers
    grid = (num_experts * triton.cdiv(num_g, config["BG"]) * triton.cdiv(num_c, config["BC"]),)
    _grouped_wgrad_kernel[grid](
        g_TG, tiles_of(c_SC, config["BK"], config["BC"]), group.token_S, dw, group.bounds,
        num_g, num_c, g_TG.stride(0), scale,
        GATHERED_FIRST=gathered_first, DESCRIPTOR=by_descriptor(g_TG.device), PRECISION=dot_precision(g_TG.dtype),
        EVEN=num_g % config["BG"] == 0, **config,
    )  # fmt: skip
    return dw if gathered_first else dw.transpose(1, 2)


def thin_wgrad(
    x: torch.Tensor, du_SR: torch.Tensor, factor_ERK: torch.Tensor, group: Grouping, gathered: bool
) -> torch.Tensor:
    """dA [E, R, K] = Σ du_s ⊗ x_s over each expert's rows; x, from which u came, as in `thin_rows`."""
    if not gathered:
        group = replace(group, token_S=torch.arange(len(x), dtype=torch.int32, device=x.device))
    return grouped_wgrad(x, du_SR, group, factor_ERK.transpose(1, 2), own=True).transpose(1, 2)


def grouped_sum(a_SN: torch.Tensor, group: Grouping, dtype: torch.dtype | None = None, tile: int = 1) -> torch.Tensor:
    """db [E, N]: the sum of a [S, N] over each expert's rows, in float32, returned in a's dtype or another.

    tile: on Triton a may have one row for each tile of so many of an expert's rows. Without tiles it is the
    specification: differences of the running sum at the experts' ends.
    """
    if group.tiles is not None:
        num_experts, num_columns = len(group.bounds) - 1, a_SN.shape[1]
        sums_EN = a_SN.new_empty(num_experts, num_columns, dtype=dtype)
        grid, bins = (num_experts, triton.cdiv(num_columns, 64)), triton.next_power_of_2(num_experts)
        _grouped_sum_kernel[grid](
            a_SN, sums_EN, group.bounds, num_experts, num_columns, TILE=tile, BINS=bins, BR=64, BN=64
        )
        return sums_EN
    assert tile == 1
    running = F.pad(a_SN.double().cumsum(0), (0, 0, 1, 0))
    return running[group.bounds.long()].diff(dim=0).to(a_SN.dtype)


@launched
def _grouped_wgrad_kernel(
    g, c, token, dw, bounds, num_g, num_c, stride_g, scale,
    GATHERED_FIRST: tl.constexpr, DESCRIPTOR: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tiles_g, tiles_c = tl.cdiv(num_g, BG), tl.cdiv(num_c, BC)
    expert, tile = tl.program_id(0) // (tiles_g * tiles_c), tl.program_id(0) % (tiles_g * tiles_c)
    begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    first_c = (tile // tiles_g) * BC
    column_g = (tile % tiles_g) * BG + tl.arange(0, BG)
    g_columns = g + column_g[None, :]
    lane = tl.arange(0, BK)
    acc = tl.zeros((BG, BC), tl.float32)
    # tokens are read one step ahead: a load whose address is itself being loaded would halve the pipeline's depth
    ahead = tl.load(token + begin + lane, mask=begin + lane < end, other=0)
    for start in range(begin, end, BK):
        row = start + lane
        source = ahead
        ahead = tl.load(token + row + BK, mask=row + BK < end, other=0)
        mask = (row < end)[:, None]
        if not EVEN:
            mask &= (column_g < num_g)[None, :]
        gathered = tl.load(g_columns + source.to(tl.int64)[:, None] * stride_g, mask=mask, other=0.0)
        # rows past the end may be another expert's; they meet zeros
        rows = matrix_tile(c, start, first_c, end, num_c, BK, BC, DESCRIPTOR)
        acc = tl.dot(tl.trans(gathered), rows, acc, input_precision=PRECISION)
    column_c = first_c + tl.arange(0, BC)
    base = dw + expert.to(tl.int64) * num_g * num_c
    result = (acc * scale).to(dw.dtype.element_ty)
    inside_g, inside_c = column_g < num_g, column_c < num_c
    if GATHERED_FIRST:
        at = base + column_g.to(tl.int64)[:, None] * num_c + column_c[None, :]
        tl.store(at, result, mask=inside_g[:, None] & inside_c[None, :])
    else:
        at = base + column_c.to(tl.int64)[:, None] * num_g + column_g[None, :]
        tl.store(at, tl.trans(result), mask=inside_c[:, None] & inside_g[None, :])


@launched
def _grouped_sum_kernel(
    a, sums, bounds, num_experts, num_columns,
    TILE: tl.constexpr, BINS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    bin = tl.arange(0, BINS)
    begins = tl.load(bounds + bin, mask=bin < num_experts, other=0)
    ends = tl.load(bounds + bin + 1, mask=bin < num_experts, other=0)
    tiles = (ends - begins + TILE - 1) // TILE
    begin = tl.sum(tl.where(bin < expert, tiles, 0), axis=0)
    end = begin + tl.sum(tl.where(bin == expert, tiles, 0), axis=0)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(begin, end, BR):
        row = start + tl.arange(0, BR)
        mask = (row < end)[:, None] & (column < num_columns)[None, :]
        at = a + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        acc += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), axis=0)
    tl.store(sums + expert * num_columns + column, acc.to(sums.dtype.element_ty), mask=column < num_columns)
