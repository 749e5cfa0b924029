"""Grouped GEMM over rows sorted by expert, and the device functions that the gradient kernels share.

    grouped_gemm:  y_s = a_s · W_e(s) (+ b)           down-projection; gradient of the up-projection's input
    up_act:        h_s = x_t(s) · W_e(s) (+ b), a_s = activation(h_s)
    thin_rows:     u_s = x_s · A_e(s)ᵀ                first factor of adapters

`up_act` gathers rows of x by index, so no permuted copy of x is stored. Its epilogue writes h (saved for the backward)
and a. Only the device knows the number of rows. So that the host need not allocate for the largest possible number,
only the first `keep` rows of h are stored. The backward recomputes the others by `up_again`; usually there are none.
Biases and adapters are added in registers.

One Triton program per multiprocessor loops over row tiles (`Grouping.tiles`; a tile never spans two experts) times
column tiles. From Hopper on, the TMA unit loads contiguous tiles through tensor descriptors. Other loads use pointers.
"""

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from expertmesh.backends import TensorDescriptor, tl, triton, warn_once
from expertmesh.kernels import quack
from expertmesh.kernels.activation import Activation, activate
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import fast_jit, num_sms
from expertmesh.kernels.packed import Packed

THIN = 64  # up to this many columns, one column tile suffices, which reads rows once


class Weights(NamedTuple):
    """Right-hand side of a grouped product: w [E, K, N], plain or transposed, and addends: biases [E, N], and adapters'
    u_s · B_e with contiguous u [S, R] and B [E, R, N], R a multiple of 16.
    """

    w: torch.Tensor
    bias: torch.Tensor | None = None
    u: torch.Tensor | None = None
    b: torch.Tensor | None = None


def grouped_gemm(a_SK: torch.Tensor, by: Weights, group: Grouping, own: bool = False) -> torch.Tensor:
    """Return y [S, N]: each row of a [S, K] times its expert's `Weights`.

    own: do not use quack. Rows after the last expert's stay uninitialized; no reader of a `Grouping` uses them. Without
    tiles this is the specification: one matrix product per expert.
    """
    if isinstance(by.w, Packed):
        by = by._replace(w=by.w.decode())
    (w_EKN, bias_EN, u_SR, b_ERN), fused = by, group.tiles is not None
    if fused and bias_EN is None and u_SR is None and not own and quack.supports(a_SK, w_EKN):
        return quack.grouped_gemm(a_SK, w_EKN, group)
    y_SN = a_SK.new_empty(a_SK.shape[0], w_EKN.shape[2])
    if fused:
        launch_rows(a_SK, by, group, y_SN)
        return y_SN
    for expert, (begin, end) in enumerate(pairwise(group.bounds.tolist())):
        torch.mm(a_SK[begin:end], w_EKN[expert], out=y_SN[begin:end])
        if bias_EN is not None:
            y_SN[begin:end] += bias_EN[expert]
    return y_SN if u_SR is None or b_ERN is None else y_SN.add_(grouped_gemm(u_SR, Weights(b_ERN), group))


def up_act(
    x_TH: torch.Tensor, by: Weights, group: Grouping, act: Activation, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return (h [S, J], a [S, I], alternating) for tokens x [T, H]. alternating: h interleaves gate and up, but w does
    not. keep: number of rows of h to store, a multiple of `group.block`. Only the fused kernel uses it.
    """
    if isinstance(by.w, Packed):
        by = by._replace(w=by.w.decode())
    if act.kind == "custom" or group.tiles is None:
        if group.tiles is not None:
            warn_once("experts with a custom activation gather rows and run it in PyTorch, not in the kernel.")
        h_SJ = grouped_gemm(x_TH.index_select(0, group.token_S), by, group, own=True)
        return h_SJ, act.forward(h_SJ), False
    if keep is None and by.u is None and quack.supports_up(x_TH, by.w, by.bias, group, act):
        return *quack.up_act(x_TH, by.w, group, act), act.gated
    num_rows, num_columns = len(group.token_S), by.w.shape[2]
    h_SJ = x_TH.new_empty(min(num_rows, keep or num_rows), num_columns)
    a_SI = x_TH.new_empty(num_rows, num_columns // (2 if act.gated else 1))
    launch_rows(x_TH, by, group, h_SJ, a_SI, act)
    return h_SJ, a_SI, False


def up_again(x_TH: torch.Tensor, by: Weights, group: Grouping, act: Activation, h_SJ: torch.Tensor) -> torch.Tensor:
    """Return `group.block` stored rows of h and then those that `up_act` with `keep` did not store. Of the former only
    rows in tiles that reach past the stored h are written.
    """
    missing_SJ = h_SJ.new_empty(group.block + len(group.token_S) - len(h_SJ), h_SJ.shape[1])
    launch_rows(x_TH, by, group, missing_SJ, None, act)
    return missing_SJ


def thin_rows(x: torch.Tensor, factor_ERK: torch.Tensor, group: Grouping, gathered: bool) -> torch.Tensor:
    """Return u [S, R]: each row of x [S, K], or if `gathered` its token's row of x [T, K], times its expert's factor.
    On Triton rows after the last expert's are zero, because `thin_wgrad` may read them.
    """
    by = Weights(factor_ERK.transpose(1, 2))
    if group.tiles is None:
        return grouped_gemm(x.index_select(0, group.token_S) if gathered else x, by, group)
    u_SR = x.new_zeros(len(group.token_S), factor_ERK.shape[1])
    launch_rows(x, by, group, u_SR, *((u_SR, Activation("none", gated=False)) if gathered else ()))
    return u_SR


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input_precision: float32 products are exact unless torch.matmul may use TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether shared memory holds 3 or 4 stages of the large tiles, as on Hopper and datacenter Blackwell."""
    get_properties: Any = torch.cuda.get_device_properties
    return device.type == "cuda" and get_properties(device).shared_memory_per_block_optin >= 200 * 1024


def tile_config(x: torch.Tensor, block_rows: int, stages: int = 3, thin: int = 0) -> dict[str, int]:
    """Return column and contraction tile, warps, stages. stages: of large tiles. thin: number of columns, if few."""
    columns = max(16, triton.next_power_of_2(thin)) if thin else 0
    if x.dtype == torch.float32:
        return dict(BN=columns or 64, BK=32, num_warps=4, num_stages=2)
    if columns:
        return dict(BN=columns, BK=64, num_warps=4, num_stages=4)
    if block_rows == 128 and has_large_shared_memory(x.device):
        return dict(BN=256, BK=64, num_warps=8, num_stages=stages)
    return dict(BN=128, BK=64, num_warps=8 if block_rows == 128 else 4, num_stages=3)


def launch_over_tiles(kernel: Any, x: torch.Tensor, group: Grouping, by: Weights, *inputs: Any, **flags: Any) -> None:
    """Launch a kernel whose programs loop over row tiles times column tiles. `inputs` include the tensors of `by`."""
    programs, rank = num_sms(x.device), 0 if by.b is None else by.b.shape[1]
    assert group.tiles is not None and rank % 16 == 0 and all(p is None or p.is_contiguous() for p in by[2:])
    flags |= dict(BM=group.block, DESCRIPTOR=by_descriptor(x.device), PRECISION=dot_precision(x.dtype), RANK=rank)
    kernel[(programs,)](*group.tiles, group.bounds, *inputs, PROGRAMS=programs, **flags)


@cache
def by_descriptor(device: torch.device) -> bool:
    """Whether `matrix_tile` loads through descriptors. Before Hopper Triton does not pipeline such loads."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def tiles_of(x_RC: torch.Tensor, rows: int, columns: int) -> Any:
    """Return the pointer or descriptor from which `matrix_tile` loads tiles [rows, columns] of a contiguous x. Raise
    ValueError if descriptors are used and a row of x is not a multiple of 16 bytes.
    """
    assert x_RC.is_contiguous()
    if not by_descriptor(x_RC.device):
        return x_RC
    if x_RC.stride(0) * x_RC.element_size() % 16:
        raise ValueError(
            f"Experts with rows of {x_RC.stride(0)} {x_RC.dtype} elements do not run on the Triton kernels, which need"
            " rows of a multiple of 16 bytes: load the model with fused={'experts': False}."
        )
    if x_RC.data_ptr() % 16:  # a view into a flat buffer or a file
        warn_once(
            "experts' weights do not start at a multiple of 16 bytes and are copied in every step: give them memory of"
            " their own (parameter.data = parameter.data.clone())."
        )
        x_RC = x_RC.clone()
    return TensorDescriptor.from_tensor(x_RC, [rows, columns])


def weight_tiles(w_EKN: torch.Tensor, inner: int, columns: int) -> tuple[Any, bool]:
    """Return (descriptor, transposed) for `weight_tile`: the weights of all experts, concatenated along the rows."""
    w_EKN = w_EKN.decode() if isinstance(w_EKN, Packed) else w_EKN
    transposed = w_EKN.stride(2) != 1
    rows_ERC = w_EKN.transpose(1, 2) if transposed else w_EKN
    if not rows_ERC.is_contiguous():
        warn_once(f"experts' weights have strides {w_EKN.stride()} and are copied in every step: make them contiguous.")
        rows_ERC = rows_ERC.contiguous()
    return tiles_of(rows_ERC.flatten(0, 1), *((columns, inner) if transposed else (inner, columns))), transposed


def launch_rows(
    x: torch.Tensor,
    by: Weights,
    group: Grouping,
    y_SN: torch.Tensor,
    a_SI: torch.Tensor | None = None,
    act: Activation | None = None,
) -> None:
    """Write rows of x [S, K] times `by` to y. With an activation gather rows of x [T, K] by index and write its values
    to a. y holds the first rows, or, with an activation but no a (recompute), the last rows.
    """
    num_experts, num_inner, num_columns = by.w.shape
    act, gathered = act or Activation("none", gated=False), act is not None
    assert not gathered or x.stride(1) == 1
    thin, recompute, kind = num_columns <= THIN and not act.gated, gathered and a_SI is None, layout(act)
    config = tile_config(x, group.block, 4 if gathered else 3, num_columns if thin else 0)
    if act.gated:
        config["BN"] //= 2  # gate and up each have an accumulator
    w_tiles, transposed = weight_tiles(by.w, config["BK"], config["BN"] * (2 if kind == "pairs" else 1))
    launch_over_tiles(
        _rows_kernel, x, group, by,
        x if gathered else tiles_of(x, group.block, config["BK"]), group.token_S if gathered else None, w_tiles,
        *by[1:], y_SN, a_SI, num_experts,
        len(group.token_S) - len(y_SN) if recompute else 0, len(y_SN),
        num_columns // 2 if act.gated else num_columns, num_inner, x.stride(0), act.alpha, act.limit,
        GATHER=gathered, LAYOUT=kind, KIND=act.kind, TRANSPOSED=transposed,
        EVEN=num_inner % config["BK"] == 0, RECOMPUTE=recompute, **config,
    )  # fmt: skip


def layout(act: Activation) -> str:
    """Return how gate and up columns lie in h: "halves", "pairs" (interleaved), or "single" without a gate."""
    if not act.gated:
        return "single"
    return "pairs" if act.interleaved else "halves"


@triton.jit
def matrix_tile(x, row, column, num_rows, num_columns, BR: tl.constexpr, BC: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Return tile [BR, BC] of x at (row, column), zero outside of x. A descriptor also reads rows past num_rows."""
    if DESCRIPTOR:
        return x.load([row, column])
    else:
        rows, columns = row + tl.arange(0, BR), column + tl.arange(0, BC)
        at = x + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        return tl.load(at, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def weight_tile(
    w, expert, k, column, num_inner, num_columns,
    BK: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Return tile [BK, BN] of an expert's weights at inner index k and a column. It may reach into the next one's."""
    if TRANSPOSED:
        first, end = expert * num_columns + column, (expert + 1) * num_columns
        return matrix_tile(w, first, k, end, num_inner, BN, BK, DESCRIPTOR).T
    else:
        first, end = expert * num_inner + k, (expert + 1) * num_inner
        return matrix_tile(w, first, column, end, num_columns, BK, BN, DESCRIPTOR)


@triton.jit
def tile_at(item, tile_expert, tile_row, num_columns, BN: tl.constexpr):
    """Return (row tile, expert, first row, first column) of a work item, an index into row tiles times column tiles."""
    column_tiles = tl.cdiv(num_columns, BN)
    tile, column = item // column_tiles, (item % column_tiles) * BN
    return tile, tl.load(tile_expert + tile), tl.load(tile_row + tile), column


@triton.jit
def row_pointers(x, token, row, end, stride):
    """Return pointers [BM, 1] to the tokens' rows of x for sorted rows; past the expert's end to token 0."""
    return x + tl.load(token + row, mask=row < end, other=0).to(tl.int64)[:, None] * stride


@triton.jit
def gathered_tile(rows, k, num_inner, EVEN: tl.constexpr):
    """Return tile [BM, BK] from row pointers [BM, 1] at inner indices k [BK]. EVEN: all k are in range, so no masks."""
    if EVEN:
        return tl.load(rows + k[None, :])
    else:
        return tl.load(rows + k[None, :], mask=(k < num_inner)[None, :], other=0.0)


@triton.jit
def add_low_rank(
    acc, u, b, expert, row, row_mask, column, width, num_columns, RANK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return acc [BM, BN] plus rows of u [S, RANK] times columns of an expert's B [RANK, num_columns] below `width`."""
    for first in tl.static_range(0, RANK, 16):  # unrolled: an inner loop would prevent flattening the caller's
        inner = first + tl.arange(0, 16)
        rows = tl.load(u + row.to(tl.int64)[:, None] * RANK + inner[None, :], mask=row_mask[:, None], other=0.0)
        at = b + (expert * RANK + inner).to(tl.int64)[:, None] * num_columns + column[None, :]
        columns = tl.load(at, mask=(column < width)[None, :], other=0.0)
        acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_bias(acc, bias, expert, column, num_columns):
    """Return acc [BM, BN] plus an expert's bias, of [E, num_columns], at `column` [BN]."""
    values = tl.load(bias + expert * num_columns + column, mask=column < num_columns, other=0.0)
    return acc + values.to(tl.float32)[None, :]


@fast_jit
def _rows_kernel(
    tile_expert, tile_row, num_tiles, bounds, x, token, w, bias, low_u, low_b, y, a_out, num_experts, first_row,
    num_rows, width, num_inner, stride_x, alpha, limit,
    GATHER: tl.constexpr, LAYOUT: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, RECOMPUTE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write num_rows rows of y from `first_row` on, and with an activation all rows of a. RECOMPUTE: write only y, and
    only tiles that end after its first BM rows.
    """
    WIDE: tl.constexpr = 2 if LAYOUT == "pairs" else 1
    SIDES: tl.constexpr = 2 if LAYOUT == "halves" else 1  # gate and up in one loop, to read x once
    num_columns = SIDES * WIDE * width
    work = tl.load(num_tiles) * tl.cdiv(width, BN)
    if RECOMPUTE:  # usually no row is missing, and no work is left
        work = tl.where(tl.load(bounds + num_experts) > first_row + BM, work, 0)
    # flattened: the next tile's loads overlap this tile's stores
    for item in tl.range(tl.program_id(0), work, PROGRAMS, flatten=not GATHER):
        tile, expert, begin, first = tile_at(item, tile_expert, tile_row, width, BN)
        end_inner, end_row = num_inner, first_row + num_rows
        if RECOMPUTE:
            missing = tl.minimum(tl.load(bounds + expert + 1), begin + BM) > first_row + BM
            end_inner, end_row = tl.where(missing, num_inner, 0), tl.where(missing, end_row, 0)
        row = begin + tl.arange(0, BM)
        if GATHER:
            x_rows = row_pointers(x, token, row, tl.load(bounds + expert + 1), stride_x)
        acc = tl.zeros((BM, WIDE * BN), tl.float32)
        up = acc
        for k in range(0, end_inner, BK):
            # rows past the expert's end may be the next expert's; they are not stored
            if GATHER:
                rows = gathered_tile(x_rows, k + tl.arange(0, BK), num_inner, EVEN)
            else:
                rows = matrix_tile(x, begin, k, num_rows, num_inner, BM, BK, DESCRIPTOR)
            columns = weight_tile(
                w, expert, k, WIDE * first, num_inner, num_columns, BK, WIDE * BN, TRANSPOSED, DESCRIPTOR
            )
            if SIDES == 2:  # up's columns start `width` after gate's
                w_up = weight_tile(w, expert, k, width + first, num_inner, num_columns, BK, BN, TRANSPOSED, DESCRIPTOR)
            acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
            if SIDES == 2:
                up = tl.dot(rows, w_up, up, input_precision=PRECISION)
        column = WIDE * first + tl.arange(0, WIDE * BN)
        if low_u is not None:
            row_mask, end = row < tl.load(bounds + expert + 1), WIDE * width
            acc = add_low_rank(acc, low_u, low_b, expert, row, row_mask, column, end, num_columns, RANK, PRECISION)
            if SIDES == 2:
                low_up = low_b + width
                up = add_low_rank(up, low_u, low_up, expert, row, row_mask, column, width, num_columns, RANK, PRECISION)
        if bias is not None:
            acc = add_bias(acc, bias, SIDES * expert, column, WIDE * width)
            if SIDES == 2:
                up = add_bias(up, bias, 2 * expert + 1, column, width)
        row = row.to(tl.int64)[:, None]
        inside = row < tl.load(bounds + expert + 1)
        dtype = y.dtype.element_ty
        y_mask = (inside & (row < end_row) if GATHER else inside) & (column < WIDE * width)[None, :]
        at = y + (row - first_row if RECOMPUTE else row) * num_columns + column[None, :]
        tl.store(at, acc.to(dtype), mask=y_mask)
        if SIDES == 2:
            tl.store(at + width, up.to(dtype), mask=y_mask)
        if KIND != "none" and not RECOMPUTE:  # from the rounded h, as the backward recomputes it
            gate = acc
            if LAYOUT == "pairs":
                gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
            a = activate(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), KIND, alpha, limit)
            column = first + tl.arange(0, BN)
            tl.store(a_out + row * width + column[None, :], a.to(dtype), mask=inside & (column < width)[None, :])
