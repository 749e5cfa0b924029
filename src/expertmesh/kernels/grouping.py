"""From tokens to rows sorted by expert, and back: a counting sort of (token, slot) pairs on the device, the tiles that
the grouped GEMMs walk, and the weighted sum of each token's rows.

T tokens choose K experts each, so S = T·K rows. Nothing here asks the device for a number, so the CPU never waits. The
sort is stable, hence deterministic: every block of rows counts its experts; then every block reads all counts and
places its own rows.

An id outside [0, E) means "not mine", among them E, Transformers' expert-parallel sentinel: such rows sort to the tail,
behind every expert's, no kernel computes them, and `position` holds -1 for them.

    out_t = Σ_k weight_tk · y_position(t,k)  (+ residual_t)          combine

Without weights it turns the rows of the up-projection's input gradient into the tokens' gradient. Sums are made in one
order, in float32. `unsort` is the same road for one number per row.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton, triton_or_reference, use_triton
from expertmesh.kernels.launch import fast_jit


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by expert. All tensors are int32 on the tokens' device.

    token_S: which token stands in sorted row s. position_TK: in which sorted row (t, k) stands, or -1 if nobody here
    computes it. bounds: where each expert's rows begin, and the last one's end [E + 1]. tiles: (expert [M], first row
    [M]) of each row tile of the Triton GEMMs and how many [1] of the M entries are used; None where products of these
    rows are PyTorch's. block: rows per tile. weight_S: the routing weights in sorted order, float32.
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
    """Sort the S = T·K routed rows by expert; the specification, a stable sort.

    ids_TK: integer tensor [T, K]; ids outside [0, num_experts) mark rows to skip. weight_TK: routing weights, any float
    type, to be sorted along (without gradient). num_rows: S, if it is known how many are not skipped.
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
    """The ids, and num_experts for all outside [0, num_experts)."""
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _int32(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """Vectors of these sizes, one allocation; each starts at a multiple of 16 bytes, as kernels expect."""
    padded = [-(-size // 4) * 4 for size in sizes]
    pieces = torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)
    return [piece if len(piece) == size else piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def _group_triton(ids_TK, num_experts, weight_TK, num_rows=None) -> Grouping:
    all_rows, top_k, device = ids_TK.numel(), ids_TK.shape[1], ids_TK.device
    here = all_rows if num_rows is None else num_rows
    bins = triton.next_power_of_2(num_experts)
    # every program of the sort reads the counts of all, so there are at most 512 of them
    sort_block = max(512, triton.next_power_of_2(triton.cdiv(all_rows, 512)))
    num_blocks = max(1, triton.cdiv(all_rows, sort_block))
    # tall tiles of the GEMMs reuse weights better, short ones waste less on small groups
    block = next((rows for rows in (128, 64, 32) if here // num_experts >= rows), 16)
    max_tiles = triton.cdiv(here, block) + num_experts
    token_S, position_S, bounds, tile_expert, tile_row, num_tiles, counts = _int32(
        device, all_rows, all_rows, 1 + num_experts, max_tiles, max_tiles, 1, num_blocks * bins
    )
    weight_S = torch.empty(all_rows, dtype=torch.float32, device=device)
    ids_S = ids_TK.reshape(-1)
    _count_kernel[(num_blocks,)](ids_S, counts, all_rows, num_experts, BINS=bins, BLOCK=sort_block, num_warps=4)
    # an id is compared with all bins and with the ids of its part: both tables must fit into registers
    part, tiles_of_block = max(16, min(128, 16384 // bins)), triton.next_power_of_2(triton.cdiv(max_tiles, num_blocks))
    _place_kernel[(num_blocks,)](
        ids_S, counts, weight_TK.reshape(-1), token_S, position_S, weight_S,
        bounds, tile_expert, tile_row, num_tiles, all_rows, num_experts, top_k,
        BLOCK=sort_block, TILE=block, TILES=tiles_of_block, BINS=bins, PART=part, num_warps=8,
    )  # fmt: skip
    tiles = tile_expert, tile_row, num_tiles
    return Grouping(token_S[:here], position_S.view(ids_TK.shape), bounds, weight_S[:here], tiles, block)


group_by_expert = triton_or_reference(_group_triton, group_by_expert_reference)


@fast_jit
def _count_kernel(ids, counts, num_rows, num_experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [block, bin] of one block."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + row, mask=row < num_rows, other=num_experts).to(tl.int32)
    counted = tl.histogram(expert, BINS, mask=(expert >= 0) & (expert < num_experts))
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), counted)


@fast_jit
def _place_kernel(
    ids, counts, weight, token, position, weight_sorted, bounds, tile_expert, tile_row, num_tiles, num_rows,
    num_experts, top_k,
    BINS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Places the rows of one block, and writes its share of the list of tiles; block 0 writes the bounds."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    bin = tl.arange(0, BINS)
    totals = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # rows of each expert in the blocks before this one
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

    place = ends - totals + before  # where the next row of each expert goes, and the next one of none
    skipped_place = tl.sum(totals, axis=0) + block * BLOCK - tl.sum(before, axis=0)
    lane = tl.arange(0, PART)
    for part in range(BLOCK // PART):
        row = block * BLOCK + part * PART + lane
        valid = row < num_rows
        expert = tl.load(ids + row, mask=valid, other=0).to(tl.int32)
        # -1: nobody computes it here; -2: behind the last row
        expert = tl.where(valid, tl.where((expert >= 0) & (expert < num_experts), expert, -1), -2)
        mine = expert[:, None] == bin[None, :]
        skipped = expert == -1
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        start = tl.where(skipped, skipped_place, tl.sum(tl.where(mine, place[None, :], 0), axis=1))
        where = start + tl.sum(earlier.to(tl.int32), axis=1)
        place += tl.sum(mine.to(tl.int32), axis=0)
        skipped_place += tl.sum(skipped.to(tl.int32), axis=0)
        tl.store(token + where, row // top_k, mask=valid)
        tl.store(position + row, tl.where(skipped, -1, where), mask=valid)
        tl.store(weight_sorted + where, tl.load(weight + row, mask=valid, other=0.0).to(tl.float32), mask=valid)


def combine_reference(
    y_SH: torch.Tensor,
    position_TK: torch.Tensor,
    weight_TK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, H] in y's dtype. position -1 contributes nothing; weight None means 1. A residual of T rows in any shape
    [..., H] is added, and gives out its shape. Sums in float32, rounded once. The specification: each token's bag of
    rows, summed (no [T, K, H] tensor is made).
    """
    wide = torch.promote_types(y_SH.dtype, torch.float32)
    mine_TK = position_TK >= 0
    ends_T = mine_TK.sum(1).cumsum(0)
    out_TH = F.embedding_bag(
        position_TK[mine_TK],
        y_SH.to(wide),
        torch.cat([ends_T.new_zeros(1), ends_T]),
        mode="sum",
        per_sample_weights=None if weight_TK is None else weight_TK[mine_TK].to(wide),
        include_last_offset=True,
    ).to(y_SH.dtype)
    return out_TH if residual is None else residual + out_TH.view(residual.shape)


def _combine_triton(y_SH, position_TK, weight_TK=None, residual=None) -> torch.Tensor:
    out = y_SH.new_empty((len(position_TK), y_SH.shape[1]) if residual is None else residual.shape)
    _launch([out], 0, y_SH, position_TK, weight_TK, residual)
    return out


combine = triton_or_reference(_combine_triton, combine_reference)


def combine_into(outs: list[torch.Tensor], own: int, y_SH, position_TK, weight_TK=None, residual=None) -> None:
    """`combine` of tokens of which the first T/R go to outs[0] [T/R, H], the next to outs[1], …, contiguous tensors in
    y's dtype which may lie in other GPUs' memory, all equally far behind the beginning of their storages. A residual of
    at most T/R rows is added to the first of outs[own].
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
        OUTS=len(outs), ALIGNED=width * y_SH.element_size() % 16 == 0,  # Triton does not see their addresses
        BLOCK=block,
    )  # fmt: skip


@lru_cache(256)  # few storages and not many tensors in them: those that CUDA graphs read must stay
def _addresses(device: torch.device, *addresses: int) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def unsort(value_PS: torch.Tensor, group: Grouping, dtype: torch.dtype) -> torch.Tensor:
    """[T, K] in `dtype`: sorted row position(t, k), summed in float32 over the P parts; 0 at position -1. Without tiles
    it is the specification.
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
    # neighbours in time write to different outs, so that wires and memory are busy together
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
    if residual is not None:  # noqa: SIM102  (known when it is compiled; the next is not)
        if (piece == own) & (row < num_residual):
            acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    to = out + at
    if OUTS > 1:
        to = (out.to(tl.int64) + tl.load(outs + piece) - tl.load(outs + own)).to(out.dtype) + at
        if ALIGNED:
            to = tl.multiple_of(to, 16)
    tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
