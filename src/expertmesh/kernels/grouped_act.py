"""The two grouped GEMMs that carry the activation: gather + up-projection, and gather + down-dgrad.

    up_act:     h_s = x_t(s) · W_up + b,   a_s = activation(h_s)                      both stored
    down_dact:  dā_s = dout_t(s) · W_downᵀ,  dweight_s = ⟨dā_s, a_s⟩,                 a_s from h_s again
                dh_s = activation'(h_s) · weight_s · dā_s,  and weight_s · a_s for the down-projection's weight gradient

Rows are read by index in the GEMM's prologue, so no permuted copy of x or of the gradient is ever stored, and the
routing weight's gradient costs no pass of its own (SonicMoE's observation, arXiv:2512.14080).
"""

import torch

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.activation import Activation, activate, activate_backward
from expertmesh.kernels.grouped_gemm import accumulate, dot_precision, grouped_gemm, grouped_gemm_reference, tile_config
from expertmesh.kernels.grouping import Grouping


def up_act(
    x_TH: torch.Tensor, w_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) of tokens x [T, H], up-projections [E, H, J] (any strides) and biases [E, J]."""
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
    h_SJ = grouped_gemm_reference(x_TH[group.token_S.long()], w_EHJ, group, bias_EJ)
    return h_SJ, act.forward(h_SJ)


def down_dact(
    dout_TH: torch.Tensor,
    w_EHI: torch.Tensor,
    h_SJ: torch.Tensor,
    weight_S: torch.Tensor,
    group: Grouping,
    act: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dh [S, J], weight·a [S, I], dweight [S] float32) from the gradient dout [T, H] of the combined output.

    w_EHI: the down-projections [E, I, H] transposed. weight_S: routing weights in sorted order. `dweight` leaves out
    the down-projection's bias.
    """
    if not use_triton(dout_TH):
        return down_dact_reference(dout_TH, w_EHI, h_SJ, weight_S, group, act)
    if act.kind == "custom":
        da_SI = grouped_gemm(dout_TH[group.token_S.long()], w_EHI, group)
        return _dact_rows(da_SI, h_SJ, weight_S, act)
    return _down_dact_triton(dout_TH, w_EHI, h_SJ, weight_S, group, act)


def down_dact_reference(
    dout_TH: torch.Tensor,
    w_EHI: torch.Tensor,
    h_SJ: torch.Tensor,
    weight_S: torch.Tensor,
    group: Grouping,
    act: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of `down_dact`."""
    da_SI = grouped_gemm_reference(dout_TH[group.token_S.long()], w_EHI, group)
    return _dact_rows(da_SI, h_SJ, weight_S, act)


def _dact_rows(
    da_SI: torch.Tensor, h_SJ: torch.Tensor, weight_S: torch.Tensor, act: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight_S1 = weight_S[:, None].to(da_SI.dtype)
    a_SI, dh_SJ = act.backward(h_SJ, weight_S1 * da_SI)
    return dh_SJ, weight_S1 * a_SI, (da_SI.float() * a_SI.float()).sum(-1)


def dact_config(dtype: torch.dtype, block_rows: int) -> dict[str, int]:
    """As `tile_config`; the epilogue needs registers of its own, so tiles are narrower."""
    config = tile_config(dtype, block_rows)
    return config | dict(BN=min(config["BN"], 128))


def _layout(act: Activation) -> str:
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
    config = tile_config(x_TH.dtype, group.block)
    if act.gated:
        config["BN"] //= 2  # gate and up accumulate side by side
    _up_act_kernel[(group.tiles[0].numel() * triton.cdiv(width, config["BN"]),)](
        x_TH,
        group.token_S,
        w_EHJ,
        bias_EJ,
        h_SJ,
        a_SI,
        *group.tiles,
        group.offsets_E,
        width,
        num_inner,
        x_TH.stride(0),
        *w_EHJ.stride(),
        act.alpha,
        act.limit,
        LAYOUT=_layout(act),
        KIND=act.kind,
        BM=group.block,
        PRECISION=dot_precision(x_TH.dtype),
        HAS_BIAS=bias_EJ is not None,
        EVEN=num_inner % config["BK"] == 0 and width % config["BN"] == 0,
        **config,
    )
    return h_SJ, a_SI


def _down_dact_triton(
    dout_TH: torch.Tensor,
    w_EHI: torch.Tensor,
    h_SJ: torch.Tensor,
    weight_S: torch.Tensor,
    group: Grouping,
    act: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert group.tiles is not None and dout_TH.stride(1) == 1
    num_rows, (_, num_inner, width) = group.slot_S.numel(), w_EHI.shape
    config = dact_config(dout_TH.dtype, group.block)
    column_tiles = triton.cdiv(width, config["BN"])
    dh_SJ, wa_SI = torch.empty_like(h_SJ), dout_TH.new_empty(num_rows, width)
    # one partial sum per column tile: adding them afterwards keeps the result deterministic
    dweight = torch.empty(column_tiles, num_rows, dtype=torch.float32, device=dout_TH.device)
    _down_dact_kernel[(group.tiles[0].numel() * column_tiles,)](
        dout_TH,
        group.token_S,
        w_EHI,
        h_SJ,
        weight_S,
        dh_SJ,
        wa_SI,
        dweight,
        *group.tiles,
        group.offsets_E,
        num_rows,
        width,
        num_inner,
        dout_TH.stride(0),
        *w_EHI.stride(),
        act.alpha,
        act.limit,
        LAYOUT=_layout(act),
        KIND=act.kind,
        BM=group.block,
        PRECISION=dot_precision(dout_TH.dtype),
        EVEN=num_inner % config["BK"] == 0 and width % config["BN"] == 0,
        **config,
    )
    return dh_SJ, wa_SI, dweight.sum(0)


@triton.jit
def _accumulate_halves(
    gate,
    up,
    x_rows,
    gate_columns,
    column_mask,
    to_up,
    num_inner,
    stride_wk,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`accumulate` for gate and up columns at once, so that x is read once; up's weights lie `to_up` behind gate's."""
    inner = tl.arange(0, BK)
    for start in range(0, num_inner, BK):
        k = start + inner
        w = gate_columns + k[:, None] * stride_wk
        if EVEN:
            x = tl.load(x_rows + k[None, :])
            w_gate = tl.load(w)
            w_up = tl.load(w + to_up)
        else:
            inside = k < num_inner
            x = tl.load(x_rows + k[None, :], mask=inside[None, :], other=0.0)
            w_mask = inside[:, None] & column_mask
            w_gate = tl.load(w, mask=w_mask, other=0.0)
            w_up = tl.load(w + to_up, mask=w_mask, other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
    return gate, up


@triton.jit
def _up_act_kernel(
    x,
    token,
    w,
    bias,
    h,
    a_out,
    tile_expert,
    tile_row,
    offsets,
    width,
    num_inner,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BN)
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    begin, end = tl.load(tile_row + tile), tl.load(offsets + expert)
    row = begin + tl.arange(0, BM)
    row_mask = (row < end)[:, None]
    first = (tl.program_id(0) % column_tiles) * BN
    column = first + tl.arange(0, BN)
    column_mask = (column < width)[None, :]
    source = tl.load(token + tl.minimum(row, end - 1)).to(tl.int64)
    x_rows = x + source[:, None] * stride_xm
    w_expert = w + expert.to(tl.int64) * stride_we
    row = row.to(tl.int64)[:, None]
    kind = h.dtype.element_ty

    if LAYOUT == "pairs":
        pair = 2 * first + tl.arange(0, 2 * BN)
        pair_mask = (pair < 2 * width)[None, :]
        acc = tl.zeros((BM, 2 * BN), tl.float32)
        w_columns = w_expert + pair[None, :] * stride_wn
        acc = accumulate(acc, x_rows, w_columns, pair_mask, num_inner, stride_wk, BK, EVEN, PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + expert * 2 * width + pair, mask=pair < 2 * width, other=0.0).to(tl.float32)[None, :]
        tl.store(h + row * (2 * width) + pair[None, :], acc.to(kind), mask=row_mask & pair_mask)
        gate, up = tl.split(tl.reshape(acc.to(kind).to(tl.float32), (BM, BN, 2)))
    elif LAYOUT == "halves":
        gate_columns = w_expert + column[None, :] * stride_wn
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        gate, up = _accumulate_halves(
            gate, up, x_rows, gate_columns, column_mask, width * stride_wn, num_inner, stride_wk, BK, EVEN, PRECISION
        )
        if HAS_BIAS:
            gate_bias = bias + expert * 2 * width + column
            gate += tl.load(gate_bias, mask=column < width, other=0.0).to(tl.float32)[None, :]
            up += tl.load(gate_bias + width, mask=column < width, other=0.0).to(tl.float32)[None, :]
        at = h + row * (2 * width) + column[None, :]
        tl.store(at, gate.to(kind), mask=row_mask & column_mask)
        tl.store(at + width, up.to(kind), mask=row_mask & column_mask)
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    else:
        gate = tl.zeros((BM, BN), tl.float32)
        w_columns = w_expert + column[None, :] * stride_wn
        gate = accumulate(gate, x_rows, w_columns, column_mask, num_inner, stride_wk, BK, EVEN, PRECISION)
        if HAS_BIAS:
            gate += tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        tl.store(h + row * width + column[None, :], gate.to(kind), mask=row_mask & column_mask)
        gate = gate.to(kind).to(tl.float32)
        up = gate
    a = activate(gate, up, KIND, alpha, limit)
    tl.store(a_out + row * width + column[None, :], a.to(kind), mask=row_mask & column_mask)


@triton.jit
def _down_dact_kernel(
    dout,
    token,
    w,
    h,
    weight,
    dh,
    wa,
    dweight,
    tile_expert,
    tile_row,
    offsets,
    num_rows,
    width,
    num_inner,
    stride_dm,
    stride_we,
    stride_wk,
    stride_wn,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BN)
    tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    begin, end = tl.load(tile_row + tile), tl.load(offsets + expert)
    row = begin + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    source = tl.load(token + tl.minimum(row, end - 1)).to(tl.int64)
    column_mask = (column < width)[None, :]
    dout_rows = dout + source[:, None] * stride_dm
    w_columns = w + expert.to(tl.int64) * stride_we + column[None, :] * stride_wn
    da = tl.zeros((BM, BN), tl.float32)
    da = accumulate(da, dout_rows, w_columns, column_mask, num_inner, stride_wk, BK, EVEN, PRECISION)

    # the tile is finished in two halves: all of it at once would not fit into the registers
    left, right = tl.split(tl.permute(tl.reshape(da, (BM, 2, BN // 2)), (0, 2, 1)))
    in_group = row < end
    scale = tl.load(weight + row, mask=in_group, other=0.0).to(tl.float32)
    first = column_tile * BN
    partial = _finish_dact(left, row, in_group, scale, first, h, dh, wa, width, alpha, limit, LAYOUT, KIND, BM, BN // 2)
    first += BN // 2
    partial += _finish_dact(
        right, row, in_group, scale, first, h, dh, wa, width, alpha, limit, LAYOUT, KIND, BM, BN // 2
    )
    tl.store(dweight + column_tile.to(tl.int64) * num_rows + row, partial, mask=in_group)


@triton.jit
def _finish_dact(
    da,
    row,
    in_group,
    scale,
    first,
    h,
    dh,
    wa,
    width,
    alpha,
    limit,
    LAYOUT: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store dh and weight·a of the columns from `first` on; returns each row's ⟨da, a⟩ over them."""
    column = first + tl.arange(0, BN)
    mask = in_group[:, None] & (column < width)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    kind = dh.dtype.element_ty
    if LAYOUT == "pairs":
        pair = 2 * first + tl.arange(0, 2 * BN)
        pair_mask = in_group[:, None] & (pair < 2 * width)[None, :]
        at = wide_row * (2 * width) + pair[None, :]
        pairs = tl.load(h + at, mask=pair_mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BM, BN, 2)))
        a, dgate, dup = activate_backward(gate, up, da * scale[:, None], KIND, alpha, limit)
        dpairs = tl.reshape(tl.join(dgate, dup), (BM, 2 * BN))
        tl.store(dh + at, dpairs.to(kind), mask=pair_mask)
    elif LAYOUT == "halves":
        at = wide_row * (2 * width) + column[None, :]
        gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + at + width, mask=mask, other=0.0).to(tl.float32)
        a, dgate, dup = activate_backward(gate, up, da * scale[:, None], KIND, alpha, limit)
        tl.store(dh + at, dgate.to(kind), mask=mask)
        tl.store(dh + at + width, dup.to(kind), mask=mask)
    else:
        at = wide_row * width + column[None, :]
        x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        a, dx, _ = activate_backward(x, x, da * scale[:, None], KIND, alpha, limit)
        tl.store(dh + at, dx.to(kind), mask=mask)
    tl.store(wa + wide_row * width + column[None, :], (a * scale[:, None]).to(kind), mask=mask)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)
