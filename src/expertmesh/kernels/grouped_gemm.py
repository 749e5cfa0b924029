"""Grouped GEMM over rows sorted by expert: y_s = a_s · W_e(s) (+ bias), and the pieces its relatives share.

Four files hold the experts' matrix products. This one multiplies rows that already stand in sorted order (the
down-projection, and the gradient of the up-projection's input). `grouped_up` and `grouped_down` gather their rows by
index and carry the activation, or its gradient, in the epilogue. `grouped_wgrad` makes the weights' gradients.

One Triton program per multiprocessor walks over row tiles (`Grouping.tiles`; a tile never spans two experts) times
column tiles; how many there are is read on the device. What lies contiguous is read by the TMA unit, through tensor
descriptors, where the GPU has one (from Hopper on), by pointers elsewhere. The transposed and the plain layout of
Transformers' weights need no copy.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from expertmesh.backends import TensorDescriptor, logger, tl, triton, use_triton
from expertmesh.kernels.grouping import Grouping
from expertmesh.kernels.launch import launched, processors


def grouped_gemm(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """y [S, N]: row s of a [S, K] times the weights [E, K, N] (plain or transposed) of its expert, plus its bias.

    Rows behind the last expert's are not written: no reader of a `Grouping` looks at them.
    """
    if use_triton(a_SK):
        return _grouped_gemm_triton(a_SK, w_EKN, group, bias_EN)
    return grouped_gemm_reference(a_SK, w_EKN, group, bias_EN)


def grouped_gemm_reference(
    a_SK: torch.Tensor,
    w_EKN: torch.Tensor,
    group: Grouping,
    bias_EN: torch.Tensor | None = None,
    *,
    gather: bool = False,
) -> torch.Tensor:
    """The specification of `grouped_gemm`: one matrix product per expert, or `F.grouped_mm` on a GPU without Triton."""
    if a_SK.is_cuda:
        y_SN = F.grouped_mm(rows_of(a_SK, group, gather=gather), w_EKN, offs=group.offsets_E)
        return y_SN if bias_EN is None else y_SN + rows_of_experts(bias_EN, group)
    y_SN = a_SK.new_empty(group.token_S.numel(), w_EKN.shape[2])
    for expert, rows in segments(group):
        torch.mm(rows_of(a_SK, group, rows, gather=gather), w_EKN[expert], out=y_SN[rows])
        if bias_EN is not None:
            y_SN[rows] += bias_EN[expert]
    return y_SN


def segments(group: Grouping) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert. Reads the offsets: for the CPU path only.

    What is done with one expert's rows before going on to the next stays in the cache, and in memory already mapped.
    """
    ends = group.offsets_E.tolist()
    return enumerate(map(slice, [0, *ends], ends))


def rows_of(x: torch.Tensor, group: Grouping, rows: slice = slice(None), *, gather: bool) -> torch.Tensor:
    """Sorted rows of x [S, N], or of x [T, N] with `gather`. One expert's at a time, a gather stays in the cache."""
    return x.index_select(0, group.token_S[rows]) if gather else x[rows]


def rows_of_experts(bias_EN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """bias [E, N] repeated to the sorted rows [S, N], without asking the device for counts."""
    row = torch.arange(group.slot_S.numel(), device=bias_EN.device, dtype=torch.int32)
    expert_S = torch.searchsorted(group.offsets_E, row, right=True).clamp_(max=bias_EN.shape[0] - 1)
    return bias_EN[expert_S]


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user allowed TF32, as for torch.matmul."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def wide(device: torch.device) -> bool:
    """Whether shared memory holds three or four stages of the large tiles: Hopper and datacentre Blackwell."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return properties is not None and properties.shared_memory_per_block_optin >= 200 * 1024


def tile_config(x: torch.Tensor, block_rows: int, stages: int = 3) -> dict[str, int]:
    """Column and contraction tile, warps and pipeline stages of the row-tile kernels; `stages` of the large tile."""
    if x.dtype == torch.float32:
        return dict(BN=64, BK=32, num_warps=4, num_stages=2)
    if block_rows == 128 and wide(x.device):
        return dict(BN=256, BK=64, num_warps=8, num_stages=stages)
    return dict(BN=128, BK=64, num_warps=8 if block_rows == 128 else 4, num_stages=3)


def constants_of(x: torch.Tensor, group: Grouping) -> dict[str, Any]:
    """What a row-tile kernel is compiled for besides its `tile_config`."""
    return dict(
        BM=group.block,
        PROGRAMS=processors(x.device),
        DESCRIPTOR=by_descriptor(x.device),
        PRECISION=dot_precision(x.dtype),
    )


@cache
def by_descriptor(device: torch.device) -> bool:
    """Whether `matrix_tile` reads through descriptors: before Hopper, Triton does not pipeline what they become."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def tiles_of(x_RC: torch.Tensor, rows: int, columns: int) -> Any:
    """What `matrix_tile` reads tiles [rows, columns] of the contiguous matrix x through.

    Raises ValueError where descriptors are used and rows of x are not whole pieces of 16 bytes.
    """
    assert x_RC.is_contiguous()
    if not by_descriptor(x_RC.device):
        return x_RC
    if x_RC.stride(0) * x_RC.element_size() % 16:
        raise ValueError(
            f"Experts with rows of {x_RC.stride(0)} {x_RC.dtype} elements do not run on the Triton kernels, which read"
            " pieces of 16 bytes: load the model with fused={'experts': False}."
        )
    if x_RC.data_ptr() % 16:  # a view into somebody's flat buffer or file
        _tell_of_copies()
        x_RC = x_RC.clone()
    return TensorDescriptor.from_tensor(x_RC, [rows, columns])


@cache
def _tell_of_copies() -> None:
    logger().warning(
        "Experts' weights do not start at a multiple of 16 bytes and are copied in every step: give them memory of"
        " their own (parameter.data = parameter.data.clone())."
    )


def weight_tiles(w_EKN: torch.Tensor, inner: int, columns: int) -> tuple[Any, bool]:
    """(descriptor, transposed) for the weights of all experts one below the other; `weight_tile` reads through it.

    Plain and transposed weights are read in place; any other strides (an adapter's sum may have them) cost a copy.
    """
    if w_EKN.stride(2) == 1:
        return tiles_of(w_EKN.contiguous().flatten(0, 1), inner, columns), False
    return tiles_of(w_EKN.transpose(1, 2).contiguous().flatten(0, 1), columns, inner), True


def _grouped_gemm_triton(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None
) -> torch.Tensor:
    assert group.tiles is not None
    num_columns, num_inner = w_EKN.shape[2], w_EKN.shape[1]
    y_SN = a_SK.new_empty(a_SK.shape[0], num_columns)
    config = tile_config(a_SK, group.block)
    w_tiles, transposed = weight_tiles(w_EKN, config["BK"], config["BN"])
    constants = constants_of(a_SK, group)
    _grouped_gemm_kernel[(constants["PROGRAMS"],)](
        tiles_of(a_SK, group.block, config["BK"]),
        w_tiles,
        bias_EN,
        y_SN,
        *group.tiles,
        group.offsets_E,
        a_SK.shape[0],
        num_columns,
        num_inner,
        TRANSPOSED=transposed,
        HAS_BIAS=bias_EN is not None,
        **constants,
        **config,
    )
    return y_SN


@triton.jit
def matrix_tile(x, row, column, num_rows, num_columns, BR: tl.constexpr, BC: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """[BR, BC] of x [num_rows, num_columns] from some row and column on; zeros outside.

    A descriptor knows x's own number of rows, which may be larger: more is read then.
    """
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
    """Weights [BK, BN] of an expert at inner index k and a column; behind them may lie another expert's."""
    if TRANSPOSED:
        first, behind = expert * num_columns + column, (expert + 1) * num_columns
        return matrix_tile(w, first, k, behind, num_inner, BN, BK, DESCRIPTOR).T
    else:
        first, behind = expert * num_inner + k, (expert + 1) * num_inner
        return matrix_tile(w, first, column, behind, num_columns, BK, BN, DESCRIPTOR)


@triton.jit
def gathered_tile(rows, k, num_inner, EVEN: tl.constexpr):
    """[BM, BK] from row pointers [BM, 1] at inner indices k [BK]; EVEN: there are as many, so no load needs a mask."""
    if EVEN:
        return tl.load(rows + k[None, :])
    else:
        return tl.load(rows + k[None, :], mask=(k < num_inner)[None, :], other=0.0)


@triton.jit
def add_bias(acc, bias, expert, column, num_columns):
    """acc [BM, BN] plus the bias [E, num_columns] of an expert at some columns [BN]."""
    values = tl.load(bias + expert * num_columns + column, mask=column < num_columns, other=0.0)
    return acc + values.to(tl.float32)[None, :]


@launched
def _grouped_gemm_kernel(
    a, w, bias, y, tile_expert, tile_row, num_tiles, offsets, num_rows, num_columns, num_inner,
    TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(num_columns, BN)
    work = tl.load(num_tiles) * column_tiles
    # flattened: the loads of the next tile are under way while this one's result is stored
    for item in tl.range(tl.program_id(0), work, PROGRAMS, flatten=True):
        tile, first = item // column_tiles, (item % column_tiles) * BN
        expert, begin = tl.load(tile_expert + tile), tl.load(tile_row + tile)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, num_inner, BK):
            # rows past the expert's end belong to the next one, or to nobody; they are not stored
            rows = matrix_tile(a, begin, k, num_rows, num_inner, BM, BK, DESCRIPTOR)
            columns = weight_tile(w, expert, k, first, num_inner, num_columns, BK, BN, TRANSPOSED, DESCRIPTOR)
            acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
        column = first + tl.arange(0, BN)
        if HAS_BIAS:
            acc = add_bias(acc, bias, expert, column, num_columns)
        row = begin + tl.arange(0, BM)
        mask = (row < tl.load(offsets + expert))[:, None] & (column < num_columns)[None, :]
        tl.store(y + row.to(tl.int64)[:, None] * num_columns + column[None, :], acc.to(y.dtype.element_ty), mask=mask)
