"""Gradients of the grouped products. Rows are gathered by index, so no permuted copy is stored.

    down_dact:      dā_s = dout_t(s) · W_downᵀ,  dweight_s = ⟨dā_s, a_s⟩,             a_s recomputed from h_s
                    dh_s = activation'(h_s) · weight_s · dā_s,  and weight_s · a_s for the down-projection's gradient
    grouped_wgrad:  dW_e = scale · Σ_s g_t(s) ⊗ c_s   over the rows s of expert e; zeros if it has none
    grouped_sum:    db_e = Σ_s a_s

Each tile of `down_dact` also sums its rows. Thus the gradients of routing weights (as in SonicMoE, arXiv:2512.14080)
and of the up-projection's bias, Σ_s dh_s, need no extra pass.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton
from expertmesh.kernels import quack
from expertmesh.kernels.activation import Activation, activate_backward
from expertmesh.kernels.grouped_gemm import (
    THIN,
    Weights,
    add_low_rank,
    by_descriptor,
    dot_precision,
    gathered_tile,
    grouped_gemm,
    has_large_shared_memory,
    launch_over_tiles,
    layout,
    matrix_tile,
    row_pointers,
    tile_at,
    tile_config,
    tiles_of,
    weight_tile,
    weight_tiles,
)
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import fast_jit


def down_dact(
    dout_TH: torch.Tensor,
    by: Weights,
    h_SJ: torch.Tensor,
    group: Grouping,
    act: Activation,
    has_bias: bool = False,
    more_SJ: torch.Tensor | None = None,
    alternating: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (dh [S, J], weight·a [S, I], dweight [P, S] float32, db [E, J] if `has_bias`).

    dout: [T, H], the gradient of the combined output. by: down-projections [E, H, I], and the adapters' part of dā.
    more_SJ: from `up_again`, the rows that h lacks. alternating: as `up_act` returns it; dh has the layout of the
    weights. dweight is the sum of its P parts, without the down-projection's bias. Rows of dh and weight·a from the end
    of the last expert's to the end of its last row tile are zero, because `grouped_wgrad` reads them. Without tiles, or
    for a custom activation, this is the specification.
    """
    weight_S = group.weight_S
    if act.kind == "custom" or group.tiles is None:
        assert not alternating, "only quack returns such h, never for custom activations"
        da_SI = grouped_gemm(dout_TH.index_select(0, group.token_S), by, group, own=True)
        has_expert_S1 = (torch.arange(len(da_SI), device=da_SI.device) < group.bounds[-1])[:, None]
        da_SI, h_SJ = torch.where(has_expert_S1, da_SI, 0), torch.where(has_expert_S1, h_SJ, 0)
        weight_S1 = weight_S[:, None].to(da_SI.dtype)
        with torch.enable_grad():
            h_SJ = h_SJ.detach().requires_grad_()
            a_SI = act.forward(h_SJ)
        (dh_SJ,) = torch.autograd.grad(a_SI, h_SJ, weight_S1 * da_SI)
        a_SI = a_SI.detach()
        db_EJ = grouped_sum(dh_SJ, group) if has_bias else None
        return dh_SJ, weight_S1 * a_SI, da_SI.float().mul_(a_SI).sum(-1)[None], db_EJ
    assert dout_TH.stride(1) == 1
    num_rows, (num_experts, num_inner, width) = len(group.token_S), by.w.shape
    config = tile_config(dout_TH, group.block, stages=4)
    if has_bias:  # the sums need registers
        config["BN"] = min(config["BN"], 128)
    w_tiles, transposed = weight_tiles(by.w, config["BK"], config["BN"])
    dh_SJ, wa_SI = h_SJ.new_empty(num_rows, h_SJ.shape[1]), dout_TH.new_empty(num_rows, width)
    # one partial sum per column tile, added afterwards: deterministic, unlike atomics
    dweight_PS = torch.empty(triton.cdiv(width, config["BN"]), num_rows, dtype=torch.float32, device=dout_TH.device)
    # likewise one partial sum of dh per row tile
    db_MJ = dweight_PS.new_empty(group.tiles[0].numel(), h_SJ.shape[1]) if has_bias else None
    pairs = act.interleaved or alternating
    launch_over_tiles(
        _down_dact_kernel, dout_TH, group, by,
        torch.zeros(1, dtype=torch.int32, device=dout_TH.device), dout_TH, group.token_S, w_tiles, by.u, by.b,
        _as_pairs(h_SJ) if pairs else h_SJ, _as_pairs(more_SJ) if pairs and more_SJ is not None else more_SJ,
        weight_S, _as_pairs(dh_SJ) if act.interleaved else dh_SJ, wa_SI, dweight_PS, db_MJ,
        num_experts, num_rows, len(h_SJ), width, num_inner, dout_TH.stride(0), act.alpha, act.limit,
        LAYOUT=layout(act), H_LAYOUT="pairs" if pairs else layout(act), KIND=act.kind, TRANSPOSED=transposed,
        EVEN=num_inner % config["BK"] == 0, **config,
    )  # fmt: skip
    db_EJ = None if db_MJ is None else grouped_sum(db_MJ, group, h_SJ.dtype, tile=group.block)
    return dh_SJ, wa_SI, dweight_PS, db_EJ


def _as_pairs(h_SJ: torch.Tensor) -> torch.Tensor:
    """View h [S, J] as [S, I] integers that each hold a gate and an up column. Splitting an integer in a register is
    free; splitting a tile's columns takes a round trip through shared memory.
    """
    return h_SJ.view(torch.int64 if h_SJ.element_size() == 4 else torch.int32)


@fast_jit
def _down_dact_kernel(
    tile_expert, tile_row, num_tiles, bounds, counter, dout, token, w, low_u, low_b, h, more, weight, dh, wa, dweight,
    db, num_experts, num_rows, num_kept, width, num_inner, stride_d, alpha, limit,
    LAYOUT: tl.constexpr, H_LAYOUT: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    work = tl.load(num_tiles) * tl.cdiv(width, BN)
    item = tl.program_id(0)
    while item < work:
        # dynamic scheduling; the result does not depend on which program computes a tile
        next_item = PROGRAMS + tl.atomic_add(counter, 1)
        tile, expert, begin, first = tile_at(item, tile_expert, tile_row, width, BN)
        end = tl.load(bounds + expert + 1)
        dout_rows = row_pointers(dout, token, begin + tl.arange(0, BM), end, stride_d)
        inner = tl.arange(0, BK)
        da = tl.zeros((BM, BN), tl.float32)
        for k in range(0, num_inner, BK):
            gradients = gathered_tile(dout_rows, k + inner, num_inner, EVEN)
            columns = weight_tile(w, expert, k, first, num_inner, width, BK, BN, TRANSPOSED, DESCRIPTOR)
            da = tl.dot(gradients, columns, da, input_precision=PRECISION)
        # recomputed: keeping it through the loop would cost registers
        row = begin + tl.arange(0, BM)
        in_group = row < end
        if low_u is not None:
            at = first + tl.arange(0, BN)
            da = add_low_rank(da, low_u, low_b, expert, row, in_group, at, width, width, RANK, PRECISION)
        scale = tl.load(weight + row, mask=in_group, other=0.0).to(tl.float32)
        WIDE: tl.constexpr = 1 if LAYOUT == "single" else 2
        tile_db = db
        if db is not None:
            tile_db += tile.to(tl.int64) * WIDE * width
        # in pieces, because the epilogue of a whole tile exceeds the registers
        PIECES: tl.constexpr = 4 if db is not None or BN == 256 else 2
        PART: tl.constexpr = BN // PIECES
        left, right = _halves(da, BM, BN)
        quarters: tl.constexpr = PIECES == 4
        pieces = _halves(left, BM, BN // 2) + _halves(right, BM, BN // 2) if quarters else (left, right)
        partial = tl.zeros((BM,), tl.float32)
        h_tile, h_row = h, row
        if more is not None:  # a tile is read from one of the two
            is_kept = tl.minimum(end, begin + BM) <= num_kept
            h_tile = tl.multiple_of(tl.where(is_kept, h, more), 16)
            h_row = row - tl.where(is_kept, 0, num_kept - BM)
        gate, up = _load_h(h_tile, h_row, in_group, first, width, PART, H_LAYOUT)
        for number in tl.static_range(PIECES):
            at = first + number * PART
            if number + 1 < PIECES:  # prefetch, because loads are not moved ahead of stores
                next_gate, next_up = _load_h(h_tile, h_row, in_group, at + PART, width, PART, H_LAYOUT)
            partial += _finish_dact(
                pieces[number], gate, up, row, in_group, scale, at, dh, wa, tile_db, width, alpha, limit,
                LAYOUT, H_LAYOUT, KIND,
            )  # fmt: skip
            if number + 1 < PIECES:
                gate, up = next_gate, next_up
        tl.store(dweight + (first // BN).to(tl.int64) * num_rows + row, partial, mask=in_group)
        if end == tl.load(bounds + num_experts):
            padding_mask = (row >= end) & (row < num_rows)
            _store_zeros(wa, row, padding_mask, first, width, BN)
            SIDES: tl.constexpr = 2 if LAYOUT == "halves" else 1
            _store_zeros(dh, row, padding_mask, SIDES * first, SIDES * width, SIDES * BN)
        item = next_item


@triton.jit
def _store_zeros(x, row, mask, first, width, BN: tl.constexpr):
    """Write zeros to columns [first, first + BN) of rows of x [S, width], 64 columns at a time."""
    for start in range(0, BN, 64):
        column = first + start + tl.arange(0, 64)
        at = x + row.to(tl.int64)[:, None] * width + column[None, :]
        zeros = tl.zeros((row.shape[0], 64), x.dtype.element_ty)
        tl.store(at, zeros, mask=mask[:, None] & (column < width)[None, :])


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Return the left and the right half of the columns of x [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _load_h(h, row, in_group, first, width, BN: tl.constexpr, LAYOUT: tl.constexpr):
    """Return (gate, up) from column `first` on. In "pairs" and "single" layouts up equals gate."""
    column = first + tl.arange(0, BN)
    mask = in_group[:, None] & (column < width)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    if LAYOUT == "halves":
        at = h + wide_row * (2 * width) + column[None, :]
        gate = tl.load(at, mask=mask, other=0.0)
        up = tl.load(at + width, mask=mask, other=0.0)
    else:
        gate = tl.load(h + wide_row * width + column[None, :], mask=mask, other=0)
        up = gate
    return gate, up


@triton.jit
def _unpack_pairs(pairs, kind: tl.constexpr):
    """Return (first, second) in float32 of integers that each hold two floats of dtype `kind`."""
    half: tl.constexpr = tl.int16 if kind.primitive_bitwidth == 16 else tl.int32
    first = pairs.to(half).to(kind, bitcast=True)
    second = (pairs >> kind.primitive_bitwidth).to(half).to(kind, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _pack_pairs(first, second, kind: tl.constexpr):
    """Inverse of `_unpack_pairs`; rounds to dtype `kind`."""
    half: tl.constexpr = tl.uint16 if kind.primitive_bitwidth == 16 else tl.uint32
    whole: tl.constexpr = tl.int32 if kind.primitive_bitwidth == 16 else tl.int64
    low = first.to(kind).to(half, bitcast=True).to(whole)
    return low | (second.to(kind).to(half, bitcast=True).to(whole) << kind.primitive_bitwidth)


@triton.jit
def _finish_dact(
    da, gate, up, row, in_group, scale, first, dh, wa, db, width, alpha, limit,
    LAYOUT: tl.constexpr, H_LAYOUT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write dh, its sum and weight·a from column `first` on, given `_load_h`'s gate and up. Return ⟨da, a⟩ by row."""
    column = first + tl.arange(0, da.shape[1])
    mask = in_group[:, None] & (column < width)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    kind: tl.constexpr = wa.dtype.element_ty
    if H_LAYOUT == "pairs":
        gate, up = _unpack_pairs(gate, kind)
    else:
        gate, up = gate.to(tl.float32), up.to(tl.float32)
    a, dgate, dup = activate_backward(gate, up, da * scale[:, None], KIND, alpha, limit)
    if LAYOUT == "halves":
        at = dh + wide_row * (2 * width) + column[None, :]
        tl.store(at, dgate.to(kind), mask=mask)
        tl.store(at + width, dup.to(kind), mask=mask)
    else:
        dx = _pack_pairs(dgate, dup, kind) if LAYOUT == "pairs" else dgate.to(kind)
        tl.store(dh + wide_row * width + column[None, :], dx, mask=mask)
    if db is not None:
        if LAYOUT == "pairs":
            _store_sum(db, dgate, 2 * column, 2 * width)
            _store_sum(db, dup, 2 * column + 1, 2 * width)
        else:
            _store_sum(db, dgate, column, width)
            if LAYOUT == "halves":
                _store_sum(db + width, dup, column, width)
    tl.store(wa + wide_row * width + column[None, :], (a * scale[:, None]).to(kind), mask=mask)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)


@triton.jit
def _store_sum(db, dh, column, width):
    """Write the sum of a tile's rows. Rows past the expert's end add zero, because their `scale` is zero."""
    tl.store(db + column, tl.sum(dh, axis=0), mask=column < width)


def grouped_wgrad(
    g_TG: torch.Tensor,
    c_SC: torch.Tensor,
    group: Grouping,
    w_EGC: torch.Tensor,
    scale: float = 1.0,
    own: bool = False,
) -> torch.Tensor:
    """Return dW [E, G, C] = scale · Σ over each expert's rows of g_t(s) [G] ⊗ c_s [C], for weights w [E, G, C].

    g: [T, G], by token. c: [S, C], sorted, finite up to the end of the last expert's last row tile. Sums are in
    float32. The result has g's dtype and the memory layout of w, plain or transposed, so that autograd need not copy.
    own: do not use quack. Without tiles this is the specification: one product per expert.
    """
    gathered_first = w_EGC.stride(2) == 1
    if group.tiles is None:
        g_SG = g_TG.index_select(0, group.token_S)
        a, b = (g_SG, c_SC) if gathered_first else (c_SC, g_SG)
        dw = a.new_empty(len(group.bounds) - 1, a.shape[1], b.shape[1])
        for expert, (begin, end) in enumerate(pairwise(group.bounds.tolist())):  # without rows the product is zero
            torch.mm(a[begin:end].t(), b[begin:end], out=dw[expert])
        dw = dw if scale == 1 else dw.mul_(scale)
        return dw if gathered_first else dw.transpose(1, 2)
    if not own and quack.supports(c_SC, w_EGC):
        return quack.wgrad(g_TG, c_SC, group, w_EGC, scale)
    num_experts, num_g, num_c = w_EGC.shape
    assert g_TG.stride(1) == 1
    dw = g_TG.new_empty(num_experts, *((num_g, num_c) if gathered_first else (num_c, num_g)))
    exact = g_TG.dtype == torch.float32
    thin = num_c if num_c <= THIN and not exact else 0
    config = tile_config(g_TG, 128 if has_large_shared_memory(g_TG.device) else 64, thin=thin)
    config |= {"BG": 64 if exact else 128, "BC": config.pop("BN")}
    config["BK"] = min(config["BK"], group.block)  # divides a row tile, past whose end numbers may be nan
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
    """Return dA [E, R, K] = Σ du_s ⊗ x_s over each expert's rows; x and `gathered` as for `thin_rows`."""
    if not gathered:
        group = replace(group, token_S=torch.arange(len(x), dtype=torch.int32, device=x.device))
    return grouped_wgrad(x, du_SR, group, factor_ERK.transpose(1, 2), own=True).transpose(1, 2)


def grouped_sum(a_SN: torch.Tensor, group: Grouping, dtype: torch.dtype | None = None, tile: int = 1) -> torch.Tensor:
    """Return db [E, N]: the float32 sum of a [S, N] over each expert's rows, in `dtype` or a's dtype.

    tile: on Triton a may hold one row per tile of this many rows of an expert. Without tiles this is the specification:
    differences of the running sum at the experts' ends.
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


@fast_jit
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
    offset = tl.arange(0, BK)
    acc = tl.zeros((BG, BC), tl.float32)
    # token ids are loaded one step ahead: dependent loads would halve the pipeline's depth
    next_source = tl.load(token + begin + offset, mask=begin + offset < end, other=0)
    for start in range(begin, end, BK):
        row = start + offset
        source = next_source
        next_source = tl.load(token + row + BK, mask=row + BK < end, other=0)
        mask = (row < end)[:, None]
        if not EVEN:
            mask &= (column_g < num_g)[None, :]
        gathered = tl.load(g_columns + source.to(tl.int64)[:, None] * stride_g, mask=mask, other=0.0)
        # rows past the end may be another expert's; they are multiplied by the zeros of `gathered`
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


@fast_jit
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
