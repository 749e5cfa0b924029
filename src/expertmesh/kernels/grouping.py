"""Permute tokens into rows sorted by expert, and combine rows: a counting sort of (token, slot) pairs on the device,
the row tiles of the grouped GEMMs, and the weighted sum of each token's rows.

T tokens choose K experts each, which gives S = T·K rows. No function synchronizes with the device. The sort is stable,
hence deterministic: every block of rows counts its experts; then every block reads all counts and writes its own rows.

An id outside [0, E) marks a row of an expert on another rank, such as E, Transformers' expert-parallel sentinel. These
rows sort to the end, after those of all experts. No kernel computes them, and their `position` is -1.

    out_t = Σ_k weight_tk · y_position(t,k)  (+ residual_t)          combine

`combine` without weights turns the up-projection's input gradient, by row, into the gradient by token. It sums in
float32, in a fixed order. `unsort` does the same for one number per row.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton, triton_or_reference, use_triton
from expertmesh.kernels.launch import fast_jit


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by expert. Tensors are int32 on the tokens' device, but weight_S is float32.

    token_S: the token of each sorted row. position_TK: the sorted row of (t, k), or -1 if this rank does not compute
    it. bounds [E + 1]: the first row of each expert, and the end of the last one's. tiles: (expert [M], first row [M],
    number of used entries [1]) of the Triton GEMMs' row tiles; None if PyTorch multiplies these rows. block: rows per
    tile. weight_S: the routing weights in sorted order.
    """

    token_S: torch.Tensor
    position_TK: torch.Tensor
    bounds: torch.Tensor
    weight_S: torch.Tensor
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    block: int = 0


def group_by_expert_reference(
    ids_TK: torch.Tensor, num_experts: int, weight_TK: torch.Tensor, num_rows: int | None = None
) -> Grouping:
    """Return the `Grouping` of the S = T·K routed rows. The specification: a stable sort.

    ids_TK: integer tensor [T, K]; rows with ids outside [0, num_experts) are skipped. weight_TK: routing weights of any
    float dtype, sorted along without gradient. num_rows: how many rows are not skipped, if the host knows it.
    """
    flat = drop_foreign_ids(ids_TK.reshape(-1), num_experts)
    expert_S, slot_S = torch.sort(flat, stable=True)
    ends = torch.arange(-1, num_experts, device=flat.device, dtype=flat.dtype)
    bounds = torch.searchsorted(expert_S, ends, right=True, out_int32=True)
    position = torch.where(flat < num_experts, slot_S.argsort(), -1).to(torch.int32)
    slot_S = slot_S[:num_rows]
    token_S = (slot_S // ids_TK.shape[1]).to(torch.int32)
    return Grouping(token_S, position.view(ids_TK.shape), bounds, weight_TK.detach().reshape(-1)[slot_S].float())


def drop_foreign_ids(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the ids, with num_experts in place of all outside [0, num_experts)."""
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _int32(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """Return vectors of these sizes in one allocation. Each starts at a multiple of 16 bytes, as kernels require."""
    padded = [-(-size // 4) * 4 for size in sizes]
    pieces = torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)
    return [piece if len(piece) == size else piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def _group_triton(ids_TK, num_experts, weight_TK, num_rows=None) -> Grouping:
    all_rows, top_k, device = ids_TK.numel(), ids_TK.shape[1], ids_TK.device
    kept_rows = all_rows if num_rows is None else num_rows
    bins = triton.next_power_of_2(num_experts)
    # every program of the sort reads the counts of all programs, so there are at most 512
    sort_block = max(512, triton.next_power_of_2(triton.cdiv(all_rows, 512)))
    num_blocks = max(1, triton.cdiv(all_rows, sort_block))
    # taller GEMM tiles reuse weights better, shorter ones waste less on small groups
    block = next((rows for rows in (128, 64, 32) if kept_rows // num_experts >= rows), 16)
    max_tiles = triton.cdiv(kept_rows, block) + num_experts
    token_S, position_S, bounds, tile_expert, tile_row, num_tiles, counts = _int32(
        device, all_rows, all_rows, 1 + num_experts, max_tiles, max_tiles, 1, num_blocks * bins
    )
    weight_S = torch.empty(all_rows, dtype=torch.float32, device=device)
    ids_S = ids_TK.reshape(-1)
    _count_kernel[(num_blocks,)](ids_S, counts, all_rows, num_experts, BINS=bins, BLOCK=sort_block, num_warps=4)
    # an id is compared with all bins and with all ids of its part: both comparisons must fit in registers
    part, tiles_of_block = max(16, min(128, 16384 // bins)), triton.next_power_of_2(triton.cdiv(max_tiles, num_blocks))
    _place_kernel[(num_blocks,)](
        ids_S, counts, weight_TK.reshape(-1), token_S, position_S, weight_S,
        bounds, tile_expert, tile_row, num_tiles, all_rows, num_experts, top_k,
        BLOCK=sort_block, TILE=block, TILES=tiles_of_block, BINS=bins, PART=part, num_warps=8,
    )  # fmt: skip
    tiles = tile_expert, tile_row, num_tiles
    return Grouping(token_S[:kept_rows], position_S.view(ids_TK.shape), bounds, weight_S[:kept_rows], tiles, block)


group_by_expert = triton_or_reference(_group_triton, group_by_expert_reference)


@fast_jit
def _count_kernel(ids, counts, num_rows, num_experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Write counts [block, bin] of one block."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + row, mask=row < num_rows, other=num_experts).to(tl.int32)
    counts_of_block = tl.histogram(expert, BINS, mask=(expert >= 0) & (expert < num_experts))
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), counts_of_block)


@fast_jit
def _place_kernel(
    ids, counts, weight, token, position, weight_sorted, bounds, tile_expert, tile_row, num_tiles, num_rows,
    num_experts, top_k,
    BINS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the sorted rows of one block and its share of the list of tiles. Block 0 also writes the bounds."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    bin = tl.arange(0, BINS)
    totals = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # rows of each expert in earlier blocks
    first = 0
    while first < num_blocks:
        other = first + tl.arange(0, PART)[:, None]
        count = tl.load(counts + other * BINS + bin[None, :], mask=other < num_blocks, other=0)
        totals += tl.sum(count, axis=0)
        before += tl.sum(tl.where(other < block, count, 0), axis=0)
        first += PART
    ends = tl.cumsum(totals, axis=0)
    if block == 0:
        tl.store(bounds, 0)
        tl.store(bounds + 1 + bin, ends, mask=bin < num_experts)

    tiles = (totals + TILE - 1) // TILE
    last_tile = tl.cumsum(tiles, axis=0)
    tile = block * TILES + tl.arange(0, TILES)
    expert_of = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    listed = expert_of[:, None] == bin[None, :]
    row_of = tl.sum(tl.where(listed, (ends - totals - (last_tile - tiles) * TILE)[None, :], 0), axis=1) + tile * TILE
    used = tl.sum(tiles, axis=0)
    if block == 0:
        tl.store(num_tiles, used)
    tl.store(tile_expert + tile, expert_of, mask=tile < used)
    tl.store(tile_row + tile, row_of, mask=tile < used)

    next_row = ends - totals + before  # next free sorted row of each expert; below, of skipped rows
    next_skipped_row = tl.sum(totals, axis=0) + block * BLOCK - tl.sum(before, axis=0)
    lane = tl.arange(0, PART)
    for part in range(BLOCK // PART):
        row = block * BLOCK + part * PART + lane
        valid = row < num_rows
        expert = tl.load(ids + row, mask=valid, other=0).to(tl.int32)
        # -1: skipped; -2: past the last row
        expert = tl.where(valid, tl.where((expert >= 0) & (expert < num_experts), expert, -1), -2)
        is_expert = expert[:, None] == bin[None, :]
        is_skipped = expert == -1
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        start = tl.where(is_skipped, next_skipped_row, tl.sum(tl.where(is_expert, next_row[None, :], 0), axis=1))
        sorted_row = start + tl.sum(earlier.to(tl.int32), axis=1)
        next_row += tl.sum(is_expert.to(tl.int32), axis=0)
        next_skipped_row += tl.sum(is_skipped.to(tl.int32), axis=0)
        tl.store(token + sorted_row, row // top_k, mask=valid)
        tl.store(position + row, tl.where(is_skipped, -1, sorted_row), mask=valid)
        tl.store(weight_sorted + sorted_row, tl.load(weight + row, mask=valid, other=0.0).to(tl.float32), mask=valid)


def combine_reference(
    y_SH: torch.Tensor,
    position_TK: torch.Tensor,
    weight_TK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return out [T, H] in y's dtype: the weighted sum of each token's rows, in float32, rounded once. The
    specification: an embedding bag, which needs no [T, K, H] tensor. Position -1 adds nothing. weight None means 1. A
    residual of T rows, [..., H], is added and gives out its shape.
    """
    sum_dtype = torch.promote_types(y_SH.dtype, torch.float32)
    is_local_TK = position_TK >= 0
    ends_T = is_local_TK.sum(1).cumsum(0)
    out_TH = F.embedding_bag(
        position_TK[is_local_TK],
        y_SH.to(sum_dtype),
        torch.cat([ends_T.new_zeros(1), ends_T]),
        mode="sum",
        per_sample_weights=None if weight_TK is None else weight_TK[is_local_TK].to(sum_dtype),
        include_last_offset=True,
    ).to(y_SH.dtype)
    return out_TH if residual is None else residual + out_TH.view(residual.shape)


def _combine_triton(y_SH, position_TK, weight_TK=None, residual=None) -> torch.Tensor:
    out = y_SH.new_empty((len(position_TK), y_SH.shape[1]) if residual is None else residual.shape)
    _launch([out], 0, y_SH, position_TK, weight_TK, residual)
    return out


combine = triton_or_reference(_combine_triton, combine_reference)


def combine_into(outs: list[torch.Tensor], own: int, y_SH, position_TK, weight_TK=None, residual=None) -> None:
    """Like `combine`, but write the first T/R tokens to outs[0] [T/R, H], the next to outs[1], and so on. outs:
    contiguous, in y's dtype, all at the same offset in their storages; they may lie in other GPUs' memory. residual: at
    most T/R rows, added to the first rows of outs[own].
    """
    if use_triton(y_SH):
        _launch(outs, own, y_SH, position_TK, weight_TK, residual)
        return
    for out, sums in zip(outs, combine_reference(y_SH, position_TK, weight_TK).chunk(len(outs)), strict=True):
        out.copy_(sums)
    if residual is not None:
        outs[own][: len(residual)] += residual


def _launch(outs, own, y_SH, position_TK, weight_TK, residual) -> None:
    (num_tokens, top_k), width = position_TK.shape, y_SH.shape[1]
    addresses = None
    if len(outs) > 1:
        addresses = _addresses(y_SH.device, *(out.untyped_storage().data_ptr() for out in outs))
    block = min(triton.next_power_of_2(width), 1024)
    _combine_kernel[(num_tokens, triton.cdiv(width, block))](
        y_SH, position_TK, weight_TK, None if residual is None else residual.contiguous(), outs[own], addresses, own,
        0 if residual is None else residual.numel() // width, width, top_k,
        OUTS=len(outs), ALIGNED=width * y_SH.element_size() % 16 == 0,  # not visible to Triton in addresses
        BLOCK=block,
    )  # fmt: skip


@lru_cache(256)  # storages are few, so nothing is evicted that a CUDA graph reads
def _addresses(device: torch.device, *addresses: int) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def unsort(value_PS: torch.Tensor, group: Grouping, dtype: torch.dtype) -> torch.Tensor:
    """Return [T, K] in `dtype`: value[:, position(t, k)] summed over P in float32; 0 at -1. The specification without
    tiles.
    """
    position_TK = group.position_TK
    if group.tiles is None:
        return torch.where(position_TK >= 0, value_PS.sum(0)[position_TK.clamp(min=0).long()], 0).to(dtype)
    out_TK = torch.empty(position_TK.shape, dtype=dtype, device=value_PS.device)
    (parts, rows), count = value_PS.shape, position_TK.numel()
    if count:
        grid = (triton.cdiv(count, 512),)
        _unsort_kernel[grid](value_PS, position_TK, out_TK, count, rows, PARTS=parts, BLOCK=512)
    return out_TK


@fast_jit
def _unsort_kernel(value, position, out, count, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + at, mask=at < count, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(value + part * rows + row, mask=row >= 0, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@fast_jit
def _combine_kernel(
    y, position, weight, residual, out, outs, own, num_residual, width, top_k,
    OUTS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # consecutive programs write to different outs, so that all links and memories are busy at once
    row, piece = tl.program_id(0) // OUTS, tl.program_id(0) % OUTS
    token = (piece * (tl.num_programs(0) // OUTS) + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, top_k):
        source = tl.load(position + token * top_k + k)
        if source >= 0:
            part = tl.load(y + source.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
            if weight is not None:
                part *= tl.load(weight + token * top_k + k).to(tl.float32)
            acc += part
    at = row.to(tl.int64) * width + column
    if residual is not None:  # noqa: SIM102  (known at compile time, the next condition is not)
        if (piece == own) & (row < num_residual):
            acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    to = out + at
    if OUTS > 1:
        to = (out.to(tl.int64) + tl.load(outs + piece) - tl.load(outs + own)).to(out.dtype) + at
        if ALIGNED:
            to = tl.multiple_of(to, 16)
    tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
