"""The up-projection of the experts with gather and activation: h_s = x_t(s) · W_up + b, a_s = activation(h_s).

Rows of x are read by index in the GEMM's prologue, so no permuted copy of x is ever stored; h (kept for the backward)
and a leave in the epilogue. How many rows there are is known on the device alone. So that the host need not allocate
for all that there might be, only the first `keep` rows of h are stored, and the backward computes `up_again` what is
missing, which is nothing unless this rank got more than its share.
"""

import torch

from expertmesh.backends import tl, use_triton
from expertmesh.kernels.activation import Activation, activate
from expertmesh.kernels.grouped_gemm import (
    add_bias,
    constants_of,
    gathered_tile,
    grouped_gemm,
    grouped_gemm_reference,
    tile_config,
    weight_tile,
    weight_tiles,
)
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import launched


def up_act(
    x_TH: torch.Tensor,
    w_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    keep: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) of tokens x [T, H], up-projections [E, H, J] (plain or transposed) and biases [E, J].

    keep: by the fused kernel, h has only this many rows, a multiple of `group.block`.
    """
    if not use_triton(x_TH):
        return up_act_reference(x_TH, w_EHJ, bias_EJ, group, act)
    if act.kind == "custom":
        h_SJ = grouped_gemm(x_TH[group.token_S.long()], w_EHJ, group, bias_EJ)
        return h_SJ, act.forward(h_SJ)
    num_rows = group.slot_S.numel()
    h_SJ = x_TH.new_empty(min(num_rows, keep or num_rows), w_EHJ.shape[2])
    a_SI = x_TH.new_empty(num_rows, w_EHJ.shape[2] // (2 if act.gated else 1))
    _up_act_triton(x_TH, w_EHJ, bias_EJ, group, act, h_SJ, a_SI)
    return h_SJ, a_SI


def up_again(
    x_TH: torch.Tensor,
    w_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    h_SJ: torch.Tensor,
) -> torch.Tensor | None:
    """The rows of h that an `up_act` with `keep` did not store, and the `group.block` rows before them, in as far as
    tiles that end behind h have them; None if h has them all.
    """
    missing = group.slot_S.numel() - len(h_SJ)
    if not missing:
        return None
    more_SJ = h_SJ.new_empty(group.block + missing, h_SJ.shape[1])
    _up_act_triton(x_TH, w_EHJ, bias_EJ, group, act, more_SJ, None)
    return more_SJ


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
    x_TH: torch.Tensor,
    w_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    h_SJ: torch.Tensor,
    a_SI: torch.Tensor | None,
) -> None:
    """Into h the first rows; or the last, where there is no a."""
    assert group.tiles is not None and x_TH.stride(1) == 1
    num_inner, num_up = w_EHJ.shape[1:]
    width = num_up // 2 if act.gated else num_up
    config = tile_config(x_TH, group.block, stages=4)
    if act.gated:
        config["BN"] //= 2  # gate and up accumulate side by side
    columns = 2 * config["BN"] if act.gated and act.interleaved else config["BN"]
    w_tiles, transposed = weight_tiles(w_EHJ, config["BK"], columns)
    constants = constants_of(x_TH, group)
    _up_act_kernel[(constants["PROGRAMS"],)](
        x_TH,
        group.token_S,
        w_tiles,
        bias_EJ,
        h_SJ,
        a_SI,
        *group.tiles,
        group.offsets_E,
        w_EHJ.shape[0],
        0 if a_SI is not None else group.slot_S.numel() - len(h_SJ),
        len(h_SJ),
        width,
        num_inner,
        x_TH.stride(0),
        act.alpha,
        act.limit,
        LAYOUT=layout(act),
        KIND=act.kind,
        TRANSPOSED=transposed,
        HAS_BIAS=bias_EJ is not None,
        EVEN=num_inner % config["BK"] == 0,
        AGAIN=a_SI is None,
        **constants,
        **config,
    )


@launched
def _up_act_kernel(
    x, token, w, bias, h, a_out, tile_expert, tile_row, num_tiles, offsets, num_experts, first_row, num_rows, width,
    num_inner, stride_x, alpha, limit,
    LAYOUT: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """h's rows from `first_row` on, as many as it has, and a's; or AGAIN h's alone, of tiles that end behind its first
    BM rows.
    """
    column_tiles = tl.cdiv(width, BN)
    work = tl.load(num_tiles) * column_tiles
    if AGAIN:  # as a rule there are no such rows
        work = tl.where(tl.load(offsets + num_experts - 1) > first_row + BM, work, 0)
    for item in range(tl.program_id(0), work, PROGRAMS):
        tile, first = item // column_tiles, (item % column_tiles) * BN
        expert, begin = tl.load(tile_expert + tile), tl.load(tile_row + tile)
        end_inner, end_row = num_inner, first_row + num_rows
        if AGAIN:
            missing = tl.minimum(tl.load(offsets + expert), begin + BM) > first_row + BM
            end_inner, end_row = tl.where(missing, num_inner, 0), tl.where(missing, end_row, 0)
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
            for k in range(0, end_inner, BK):
                tokens = gathered_tile(x_rows, k + inner, num_inner, EVEN)
                w_gate = weight_tile(w, expert, k, first, num_inner, 2 * width, BK, BN, TRANSPOSED, DESCRIPTOR)
                w_up = weight_tile(w, expert, k, width + first, num_inner, 2 * width, BK, BN, TRANSPOSED, DESCRIPTOR)
                gate = tl.dot(tokens, w_gate, gate, input_precision=PRECISION)
                up = tl.dot(tokens, w_up, up, input_precision=PRECISION)
            if HAS_BIAS:
                gate = add_bias(gate, bias, 2 * expert, column, width)
                up = add_bias(up, bias, 2 * expert + 1, column, width)
            at = h + (row - first_row) * (2 * width) + column[None, :]
            kept = (row < tl.minimum(tl.load(offsets + expert), end_row)) & (column < width)[None, :]
            tl.store(at, gate.to(kind), mask=kept)
            tl.store(at + width, up.to(kind), mask=kept)
        else:
            WIDE: tl.constexpr = 2 if LAYOUT == "pairs" else 1
            acc = tl.zeros((BM, WIDE * BN), tl.float32)
            for k in range(0, end_inner, BK):
                tokens = gathered_tile(x_rows, k + inner, num_inner, EVEN)
                columns = weight_tile(
                    w, expert, k, WIDE * first, num_inner, WIDE * width, BK, WIDE * BN, TRANSPOSED, DESCRIPTOR
                )
                acc = tl.dot(tokens, columns, acc, input_precision=PRECISION)
            wide = WIDE * first + tl.arange(0, WIDE * BN)
            if HAS_BIAS:
                acc = add_bias(acc, bias, expert, wide, WIDE * width)
            at = h + (row - first_row) * (WIDE * width) + wide[None, :]
            kept = row < tl.minimum(tl.load(offsets + expert), end_row)
            tl.store(at, acc.to(kind), mask=kept & (wide < WIDE * width)[None, :])
            if LAYOUT == "pairs":
                gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
            else:
                gate = acc
                up = acc
        if not AGAIN:  # from the rounded h, as the backward sees it
            a = activate(gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32), KIND, alpha, limit)
            mask = (row < tl.load(offsets + expert)) & (column < width)[None, :]
            tl.store(a_out + row * width + column[None, :], a.to(kind), mask=mask)
