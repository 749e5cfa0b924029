"""The up-projection of the experts with gather and activation: h_s = x_t(s) · W_up + b, a_s = activation(h_s).

Rows of x are read by index in the GEMM's prologue, so no permuted copy of x is ever stored; h (kept for the backward)
and a leave in the epilogue.
"""

import torch

from expertmesh.backends import tl, use_triton
from expertmesh.kernels.activation import Activation, activate
from expertmesh.kernels.grouped_gemm import (
    add_bias,
    by_descriptor,
    dot_precision,
    gathered_tile,
    grouped_gemm,
    grouped_gemm_reference,
    programs,
    tile_config,
    weight_tile,
    weight_tiles,
)
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import launched


def up_act(
    x_TH: torch.Tensor, w_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) of tokens x [T, H], up-projections [E, H, J] (plain or transposed) and biases [E, J]."""
    if not use_triton(x_TH):
        return up_act_reference(x_TH, w_EHJ, bias_EJ, group, act)
    if act.kind == "custom":
        h_SJ = grouped_gemm(x_TH[group.token_S.long()], w_EHJ, group, bias_EJ)
        return h_SJ, act.forward(h_SJ)
    return _up_act_triton(x_TH, w_EHJ, bias_EJ, group, act)


def up_act_reference(
    x_TH: torch.Tensor, w_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `up_act`."""
    h_SJ = grouped_gemm_reference(x_TH, w_EHJ, group, bias_EJ, gather=True)
    return h_SJ, act.forward(h_SJ)


def layout(act: Activation) -> str:
    """How the kernels find gate and up columns in h: in halves, in pairs, or a single kind of column."""
    if not act.gated:
        return "single"
    return "pairs" if act.interleaved else "halves"


def _up_act_triton(
    x_TH: torch.Tensor, w_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    assert group.tiles is not None and x_TH.stride(1) == 1
    num_rows, (_, num_inner, num_up) = group.slot_S.numel(), w_EHJ.shape
    width = num_up // 2 if act.gated else num_up
    h_SJ, a_SI = x_TH.new_empty(num_rows, num_up), x_TH.new_empty(num_rows, width)
    config = tile_config(x_TH, group.block, stages=4)
    if act.gated:
        config["BN"] //= 2  # gate and up accumulate side by side
    columns = 2 * config["BN"] if act.gated and act.interleaved else config["BN"]
    w_tiles, transposed = weight_tiles(w_EHJ, config["BK"], columns)
    num_programs = programs(x_TH.device)
    _up_act_kernel[(num_programs,)](
        x_TH,
        group.token_S,
        w_tiles,
        bias_EJ,
        h_SJ,
        a_SI,
        *group.tiles,
        group.offsets_E,
        width,
        num_inner,
        x_TH.stride(0),
        act.alpha,
        act.limit,
        LAYOUT=layout(act),
        KIND=act.kind,
        TRANSPOSED=transposed,
        DESCRIPTOR=by_descriptor(x_TH.device),
        PROGRAMS=num_programs,
        BM=group.block,
        PRECISION=dot_precision(x_TH.dtype),
        HAS_BIAS=bias_EJ is not None,
        EVEN=num_inner % config["BK"] == 0,
        **config,
    )
    return h_SJ, a_SI


@launched
def _up_act_kernel(
    x,
    token,
    w,
    bias,
    h,
    a_out,
    tile_expert,
    tile_row,
    num_tiles,
    offsets,
    width,
    num_inner,
    stride_x,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    KIND: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BN)
    work = tl.load(num_tiles) * column_tiles
    for item in range(tl.program_id(0), work, PROGRAMS):
        tile, first = item // column_tiles, (item % column_tiles) * BN
        expert, begin = tl.load(tile_expert + tile), tl.load(tile_row + tile)
        row = begin + tl.arange(0, BM)
        source = tl.load(token + row, mask=row < tl.load(offsets + expert), other=0)
        x_rows = x + source.to(tl.int64)[:, None] * stride_x
        inner = tl.arange(0, BK)
        column = first + tl.arange(0, BN)
        row = row.to(tl.int64)[:, None]
        kind = h.dtype.element_ty

        if LAYOUT == "halves":
            # gate and up columns at once, so that x is read once; up's weights lie `width` behind gate's
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for k in range(0, num_inner, BK):
                tokens = gathered_tile(x_rows, k + inner, num_inner, EVEN)
                w_gate = weight_tile(w, expert, k, first, num_inner, 2 * width, BK, BN, TRANSPOSED, DESCRIPTOR)
                w_up = weight_tile(w, expert, k, width + first, num_inner, 2 * width, BK, BN, TRANSPOSED, DESCRIPTOR)
                gate = tl.dot(tokens, w_gate, gate, input_precision=PRECISION)
                up = tl.dot(tokens, w_up, up, input_precision=PRECISION)
            if HAS_BIAS:
                gate = add_bias(gate, bias, 2 * expert, column, width)
                up = add_bias(up, bias, 2 * expert + 1, column, width)
            at = h + row * (2 * width) + column[None, :]
            mask = (row < tl.load(offsets + expert)) & (column < width)[None, :]
            tl.store(at, gate.to(kind), mask=mask)
            tl.store(at + width, up.to(kind), mask=mask)
        else:
            WIDE: tl.constexpr = 2 if LAYOUT == "pairs" else 1
            acc = tl.zeros((BM, WIDE * BN), tl.float32)
            for k in range(0, num_inner, BK):
                tokens = gathered_tile(x_rows, k + inner, num_inner, EVEN)
                columns = weight_tile(
                    w, expert, k, WIDE * first, num_inner, WIDE * width, BK, WIDE * BN, TRANSPOSED, DESCRIPTOR
                )
                acc = tl.dot(tokens, columns, acc, input_precision=PRECISION)
            wide = WIDE * first + tl.arange(0, WIDE * BN)
            if HAS_BIAS:
                acc = add_bias(acc, bias, expert, wide, WIDE * width)
            at = h + row * (WIDE * width) + wide[None, :]
            in_group = row < tl.load(offsets + expert)
            mask = in_group & (column < width)[None, :]
            tl.store(at, acc.to(kind), mask=in_group & (wide < WIDE * width)[None, :])
            if LAYOUT == "pairs":
                gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
            else:
                gate = acc
                up = acc
        # from the rounded h, as the backward sees it
        a = activate(gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32), KIND, alpha, limit)
        tl.store(a_out + row * width + column[None, :], a.to(kind), mask=mask)
