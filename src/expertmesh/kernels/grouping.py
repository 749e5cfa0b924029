"""Counting sort of (token, slot) pairs by expert, on the device, and the tiles that the grouped GEMMs walk.

T tokens choose K experts each, so S = T·K rows. Sorting by expert makes each expert's rows contiguous. Nothing here
asks the device for a number: counts stay there, so the CPU never waits. The sort is stable, hence deterministic.

An id equal to E means "not mine" (Transformers' expert-parallel sentinel): such rows sort to the tail, behind every
expert's, no kernel computes them, and `position` holds -1 for them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.backends import tl, triton, use_triton


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by expert. All tensors are int32 on the tokens' device.

    slot_S: which flat (token·K + k) stands in sorted row s. token_S: its token, slot_S // K.
    position_TK: the inverse, in which sorted row (t, k) stands, or -1 if nobody here computes it.
    offsets_E: where each expert's rows end. tiles: (expert [M], first row [M]) of each row tile of the Triton GEMMs,
    expert -1 for unused entries; None on the PyTorch path. block: rows per tile.
    """

    slot_S: torch.Tensor
    token_S: torch.Tensor
    position_TK: torch.Tensor
    offsets_E: torch.Tensor
    tiles: tuple[torch.Tensor, torch.Tensor] | None = None
    block: int = 0


def group_by_expert(ids_TK: torch.Tensor, num_experts: int) -> Grouping:
    """Sort the S = T·K routed rows by expert.

    ids_TK: integer tensor [T, K] with values in [0, num_experts]; num_experts itself marks rows to skip.
    """
    if use_triton(ids_TK):
        return _group_triton(ids_TK, num_experts)
    return group_by_expert_reference(ids_TK, num_experts)


def group_by_expert_reference(ids_TK: torch.Tensor, num_experts: int) -> Grouping:
    """The specification of `group_by_expert`, in PyTorch: a stable sort."""
    flat = ids_TK.reshape(-1)
    slot_S = torch.sort(flat, stable=True).indices
    ends = torch.arange(num_experts, device=flat.device)
    offsets_E = torch.searchsorted(flat[slot_S].contiguous(), ends.to(flat.dtype), right=True).to(torch.int32)
    position = torch.empty_like(slot_S)
    position[slot_S] = torch.arange(flat.numel(), device=flat.device)
    position = torch.where(flat < num_experts, position, -1).to(torch.int32)
    slot_S = slot_S.to(torch.int32)
    return Grouping(slot_S, slot_S // ids_TK.shape[1], position.view(ids_TK.shape), offsets_E)


def _block_rows(rows_per_expert: int) -> int:
    """Rows per GEMM tile: tall tiles reuse weights better, short ones waste less on small groups."""
    for block in (128, 64, 32):
        if rows_per_expert >= block:
            return block
    return 16


_SORT_BLOCK = 256


def _group_triton(ids_TK: torch.Tensor, num_experts: int) -> Grouping:
    num_rows, top_k, device = ids_TK.numel(), ids_TK.shape[1], ids_TK.device
    ids_S = ids_TK.reshape(-1)
    bins = triton.next_power_of_2(num_experts + 1)
    num_blocks = triton.cdiv(num_rows, _SORT_BLOCK)
    int32: dict[str, Any] = dict(dtype=torch.int32, device=device)

    # [bin, block], so that one running sum over the whole table gives each block's first row within its bin
    counts = torch.empty(bins, num_blocks, **int32)
    slot_S, token_S = torch.empty(num_rows, **int32), torch.empty(num_rows, **int32)
    position_TK, offsets_E = torch.empty(ids_TK.shape, **int32), torch.empty(num_experts, **int32)
    _count_kernel[(num_blocks,)](ids_S, counts, num_rows, num_blocks, BINS=bins, BLOCK=_SORT_BLOCK)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    _place_kernel[(num_blocks,)](
        ids_S, counts, ends, slot_S, token_S, position_TK, num_rows, num_blocks, num_experts, top_k, BLOCK=_SORT_BLOCK
    )

    block = _block_rows(num_rows // num_experts)
    max_tiles = triton.cdiv(num_rows, block) + num_experts
    tile_expert, tile_row = torch.empty(max_tiles, **int32), torch.empty(max_tiles, **int32)
    _tile_kernel[(num_experts + 1,)](
        ends, offsets_E, tile_expert, tile_row, num_blocks, num_experts, max_tiles, BINS=bins, BLOCK=block
    )
    return Grouping(slot_S, token_S, position_TK, offsets_E, (tile_expert, tile_row), block)


@triton.jit
def _count_kernel(ids, counts, num_rows, num_blocks, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + rows, mask=rows < num_rows, other=BINS - 1).to(tl.int32)
    bin = tl.arange(0, BINS)
    counted = tl.sum(((expert[:, None] == bin[None, :]) & (rows < num_rows)[:, None]).to(tl.int32), axis=0)
    tl.store(counts + bin * num_blocks + block, counted)


@triton.jit
def _place_kernel(
    ids, counts, ends, slot, token, position, num_rows, num_blocks, num_experts, top_k, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    rows = block * BLOCK + lane
    valid = rows < num_rows
    expert = tl.load(ids + rows, mask=valid, other=-1).to(tl.int32)
    same_before = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(same_before.to(tl.int32), axis=1)
    cell = expert * num_blocks + block
    first = tl.load(ends + cell, mask=valid, other=0) - tl.load(counts + cell, mask=valid, other=0)
    where = first + rank
    tl.store(slot + where, rows, mask=valid)
    tl.store(token + where, rows // top_k, mask=valid)
    tl.store(position + rows, tl.where(expert < num_experts, where, -1), mask=valid)


@triton.jit
def _tile_kernel(
    ends,
    offsets,
    tile_expert,
    tile_row,
    num_blocks,
    num_experts,
    max_tiles,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program e lists expert e's tiles behind those of the experts before it; program E marks the rest as unused."""
    expert = tl.program_id(0)
    bin = tl.arange(0, BINS)
    end = tl.load(ends + bin * num_blocks + num_blocks - 1)
    begin = tl.load(ends + bin * num_blocks - 1, mask=bin > 0, other=0)
    tiles = tl.where(bin < num_experts, (end - begin + BLOCK - 1) // BLOCK, 0)
    first_tile = tl.sum(tl.where(bin < expert, tiles, 0), axis=0)
    if expert < num_experts:
        mine = bin == expert
        row, num_tiles = tl.sum(tl.where(mine, begin, 0), axis=0), tl.sum(tl.where(mine, tiles, 0), axis=0)
        tl.store(offsets + expert, tl.sum(tl.where(mine, end, 0), axis=0))
        for i in range(0, num_tiles):
            tl.store(tile_expert + first_tile + i, expert)
            tl.store(tile_row + first_tile + i, row + i * BLOCK)
    else:
        for i in range(first_tile, max_tiles):
            tl.store(tile_expert + i, -1)
            tl.store(tile_row + i, 0)
