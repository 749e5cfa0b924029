"""Counting sort of (token, slot) pairs by expert, on the device, and the tiles that the grouped GEMMs walk.

T tokens choose K experts each, so S = T·K rows. Sorting by expert makes each expert's rows contiguous. Nothing here
asks the device for a number: counts stay there, so the CPU never waits. The sort is stable, hence deterministic. It is
two launches: every block of rows counts its experts; then every block reads all counts and places its own rows.

An id outside [0, E) means "not mine", among them E, Transformers' expert-parallel sentinel: such rows sort to the tail,
behind every expert's, no kernel computes them, and `position` holds -1 for them.
"""

from dataclasses import dataclass

import torch

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by expert. All tensors are int32 on the tokens' device.

    slot_S: which flat (token·K + k) stands in sorted row s. token_S: its token, slot_S // K.
    position_TK: the inverse, in which sorted row (t, k) stands, or -1 if nobody here computes it.
    bounds: where each expert's rows begin, and the last one's end [E + 1]; offsets_E: where they end.
    tiles: (expert [M], first row [M]) of each row tile of the Triton GEMMs and how many [1] of the M entries are used;
    None where products of these rows are PyTorch's. block: rows per tile. weight_S: the routing weights in sorted
    order, float32, if `group_by_expert` was given them.
    """

    slot_S: torch.Tensor
    token_S: torch.Tensor
    position_TK: torch.Tensor
    bounds: torch.Tensor
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    block: int = 0
    weight_S: torch.Tensor | None = None

    @property
    def offsets_E(self) -> torch.Tensor:
        return self.bounds[1:]


def group_by_expert(ids_TK: torch.Tensor, num_experts: int, weight_TK: torch.Tensor | None = None) -> Grouping:
    """Sort the S = T·K routed rows by expert.

    ids_TK: integer tensor [T, K]; ids outside [0, num_experts) mark rows to skip. weight_TK: routing weights, any float
    type, to be sorted along (without gradient).
    """
    if use_triton(ids_TK):
        return _group_triton(ids_TK, num_experts, weight_TK)
    return group_by_expert_reference(ids_TK, num_experts, weight_TK)


def group_by_expert_reference(
    ids_TK: torch.Tensor, num_experts: int, weight_TK: torch.Tensor | None = None
) -> Grouping:
    """The specification of `group_by_expert`, in PyTorch: a stable sort."""
    flat = or_none(ids_TK.reshape(-1), num_experts)
    expert_S, slot_S = torch.sort(flat, stable=True)
    ends = torch.arange(-1, num_experts, device=flat.device)
    bounds = torch.searchsorted(expert_S, ends.to(flat.dtype), right=True).to(torch.int32)
    position = torch.empty_like(slot_S)
    position[slot_S] = torch.arange(flat.numel(), device=flat.device)
    position = torch.where(flat < num_experts, position, -1).to(torch.int32)
    weight_S = None if weight_TK is None else weight_TK.detach().reshape(-1)[slot_S].float()
    slot_S = slot_S.to(torch.int32)
    return Grouping(slot_S, slot_S // ids_TK.shape[1], position.view(ids_TK.shape), bounds, weight_S=weight_S)


def or_none(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The ids, and num_experts for all outside [0, num_experts)."""
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _block_rows(rows_per_expert: int) -> int:
    """Rows per GEMM tile: tall tiles reuse weights better, short ones waste less on small groups."""
    for block in (128, 64, 32):
        if rows_per_expert >= block:
            return block
    return 16


def _sort_block(num_rows: int) -> int:
    """Rows per program of the sort: every program reads the counts of all, so there are at most 512 of them."""
    return max(512, triton.next_power_of_2(triton.cdiv(num_rows, 512)))


def _int32(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """Vectors of these sizes, one allocation; each starts at a multiple of 16 bytes, as kernels expect."""
    padded = [-(-size // 4) * 4 for size in sizes]
    pieces = torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)
    return [piece if len(piece) == size else piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def _group_triton(ids_TK: torch.Tensor, num_experts: int, weight_TK: torch.Tensor | None) -> Grouping:
    num_rows, top_k, device = ids_TK.numel(), ids_TK.shape[1], ids_TK.device
    bins = triton.next_power_of_2(num_experts)
    sort_block = _sort_block(num_rows)
    num_blocks = max(1, triton.cdiv(num_rows, sort_block))
    block = _block_rows(num_rows // num_experts)
    max_tiles = triton.cdiv(num_rows, block) + num_experts
    slot_S, token_S, position_S, bounds, tile_expert, tile_row, num_tiles, counts = _int32(
        device, num_rows, num_rows, num_rows, 1 + num_experts, max_tiles, max_tiles, 1, num_blocks * bins
    )
    weight_S = None if weight_TK is None else torch.empty(num_rows, dtype=torch.float32, device=device)
    ids_S = ids_TK.reshape(-1)
    _count_kernel[(num_blocks,)](ids_S, counts, num_rows, num_experts, BINS=bins, BLOCK=sort_block, num_warps=4)
    # an id is compared with all bins and with the ids of its part: both tables must fit into registers
    part, tiles_of_block = max(16, min(128, 16384 // bins)), triton.next_power_of_2(triton.cdiv(max_tiles, num_blocks))
    _place_kernel[(num_blocks,)](
        ids_S, counts, None if weight_TK is None else weight_TK.reshape(-1), slot_S, token_S, position_S, weight_S,
        bounds, tile_expert, tile_row, num_tiles, num_rows, num_experts, top_k,
        BLOCK=sort_block, TILE=block, TILES=tiles_of_block, BINS=bins, PART=part, num_warps=8,
    )  # fmt: skip
    tiles = tile_expert, tile_row, num_tiles
    return Grouping(slot_S, token_S, position_S.view(ids_TK.shape), bounds, tiles, block, weight_S)


@launched
def _count_kernel(ids, counts, num_rows, num_experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [block, bin] of one block."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + row, mask=row < num_rows, other=num_experts).to(tl.int32)
    counted = tl.histogram(expert, BINS, mask=(expert >= 0) & (expert < num_experts))
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), counted)


@launched
def _place_kernel(
    ids, counts, weight, slot, token, position, weight_sorted, bounds, tile_expert, tile_row, num_tiles, num_rows,
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
        tl.store(slot + where, row, mask=valid)
        tl.store(token + where, row // top_k, mask=valid)
        tl.store(position + row, tl.where(skipped, -1, where), mask=valid)
        if weight is not None:
            tl.store(weight_sorted + where, tl.load(weight + row, mask=valid, other=0.0).to(tl.float32), mask=valid)
