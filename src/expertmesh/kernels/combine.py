"""Un-permute, weight and sum: every token collects its K rows from the sorted order.

    out_t = Σ_k weight_tk · y_position(t,k)  (+ residual_t)

The same kernel, without weights, turns the rows of the up-projection's input gradient into the tokens' gradient. Each
output element is written by one program in a fixed order, in float32: no atomics, no scatter, deterministic. `unsort`
is the same road for one number per row.
"""

from functools import lru_cache

import torch
from torch.nn import functional as F

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched


def combine(
    y_SH: torch.Tensor,
    position_TK: torch.Tensor,
    weight_TK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, H] in y's dtype. position -1 contributes nothing; weight None means 1. A residual of T rows in any shape
    [..., H] is added, and gives out its shape. Sums in float32, rounded once.
    """
    if use_triton(y_SH):
        out = y_SH.new_empty((len(position_TK), y_SH.shape[1]) if residual is None else residual.shape)
        _launch([out], 0, y_SH, position_TK, weight_TK, residual)
        return out
    return combine_reference(y_SH, position_TK, weight_TK, residual)


def combine_into(
    outs: list[torch.Tensor],
    own: int,
    y_SH: torch.Tensor,
    position_TK: torch.Tensor,
    weight_TK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """`combine` of tokens of which the first T/R go to outs[0] [T/R, H], the next to outs[1], …, contiguous tensors in
    y's dtype which may lie in other GPUs' memory, all equally far behind the beginning of their storages. A residual of
    at most T/R rows is added to the first of outs[own].
    """
    if use_triton(y_SH):
        _launch(outs, own, y_SH, position_TK, weight_TK, residual)
        return
    pieces = position_TK.chunk(len(outs)), [None] * len(outs) if weight_TK is None else weight_TK.chunk(len(outs))
    for number, (out, position, weight) in enumerate(zip(outs, *pieces, strict=True)):
        out.copy_(combine_reference(y_SH, position, weight))
        if residual is not None and number == own:
            out[: len(residual)] += residual


@lru_cache(256)  # few storages and not many tensors in them: those that CUDA graphs read must stay
def _addresses(device: torch.device, *addresses: int) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _launch(
    outs: list[torch.Tensor], own: int, y_SH: torch.Tensor, position_TK: torch.Tensor, weight_TK: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:  # fmt: skip
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


def combine_reference(
    y_SH: torch.Tensor,
    position_TK: torch.Tensor,
    weight_TK: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `combine`: each token's bag of rows, summed (no [T, K, H] tensor is made)."""
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


def unsort(value_PS: torch.Tensor, position_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, K] in `dtype`: sorted row position(t, k), summed in float32 over the P parts; 0 at position -1."""
    if use_triton(value_PS):
        out_TK = torch.empty(position_TK.shape, dtype=dtype, device=value_PS.device)
        (parts, rows), count = value_PS.shape, position_TK.numel()
        if count:
            grid = (triton.cdiv(count, 512),)
            _unsort_kernel[grid](value_PS, position_TK, out_TK, count, rows, PARTS=parts, BLOCK=512)
        return out_TK
    return unsort_reference(value_PS, position_TK, dtype)


def unsort_reference(value_PS: torch.Tensor, position_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The specification of `unsort`."""
    value_S = value_PS.sum(0)
    return torch.where(position_TK >= 0, value_S[position_TK.clamp(min=0).long()], 0).to(dtype)


@launched
def _unsort_kernel(value, position, out, count, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + at, mask=at < count, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(value + part * rows + row, mask=row >= 0, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@launched
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
