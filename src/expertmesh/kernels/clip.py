"""Gradient clipping: the norm of all gradients and their scaling, each in one launch and one pass over memory."""

from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, use_triton
from expertmesh.kernels import tensor_lists
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.tensor_lists import chunk_of, elements, moving_base, store

OPTIONS = {"BLOCK": 4096, "num_warps": 8}


class RunningNorm(NamedTuple):
    """State of a norm that grows with each gradient, as float32 scalars on the device: the sum of squares so far, the
    clipping factor that follows from it, and found_inf, which is 1 if the sum is not finite, else 0."""

    squares: torch.Tensor
    scale: torch.Tensor
    found_inf: torch.Tensor


def add_to_norm_(
    tally: RunningNorm, tensors: list[torch.Tensor], copies: int = 1, bound: float | None = None,
    running: torch.Tensor | None = None, own: bool = False,
) -> None:  # fmt: skip
    """Add the squares of `tensors` to `tally` in place and update its other fields: two launches, no sync.

    copies: number of ranks that hold these tensors; squares are divided by it. With `bound` and `running` (a float32
    scalar, the norm of earlier steps) the scale becomes `clip_factor(running, bound)`. With `own` (no other rank holds
    these tensors) the norm so far is used if it is larger than `running`.
    """
    for part in _partial_sums(tensors):
        if use_triton(part):
            options = {"OWN": own, "BLOCK": 1024, "num_warps": 4}
            with torch.cuda.device_of(part):
                _tally_kernel[(1,)](part, len(part), float(copies), bound, running, *tally, **options)
        else:
            add_to_norm_reference_(tally, part, copies, bound, running, own)


def add_to_norm_reference_(
    tally: RunningNorm, part: torch.Tensor, copies: int, bound: float | None, running: torch.Tensor | None, own: bool
) -> None:
    """Reference of `add_to_norm_`. part: sums of squares."""
    tally.squares.add_(part.sum() / copies)
    tally.found_inf.copy_(1.0 - torch.isfinite(tally.squares).float())
    if bound is not None and running is not None:
        norm = torch.maximum(running, tally.squares.sqrt()) if own else running
        tally.scale.copy_(clip_factor(norm, bound))


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return the factor by which `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def squared_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements as a float32 scalar on the tensors' device.

    tensors: any shapes, strides and float dtypes of up to 32 bits, on one device. Deterministic; sums are float32.
    """
    sums = [part.sum() for part in _partial_sums(tensors)]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def _partial_sums(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return 1-D float32 tensors of partial sums of squares, one element per chunk."""
    parts, others = _run(_squared_sum_kernel, tensors)
    return [squared_sum_reference(others)[None], *parts] if others or not parts else parts


def squared_sum_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Reference of `squared_sum`."""
    if not tensors:
        return torch.zeros(())
    # the square root equals the norm of `torch.nn.utils.clip_grad_norm_` bit for bit
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32))).square()


def scale_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiply each tensor in place by `scale`, a float32 scalar on any device, without a sync.

    The product is rounded once. With a scale of 1 the kernel reads and writes nothing.
    """
    scale_reference_(_run(_scale_kernel, tensors, scale)[1], scale)


def scale_reference_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Reference of `scale_`."""
    for tensor in tensors:
        tensor *= scale.to(tensor.device, non_blocking=True)


def _run(
    kernel: Any, tensors: list[torch.Tensor], scale: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run the kernel on all tensors it supports. Return (each launch's scale or partial sums, the other tensors)."""
    groups, others = tensor_lists.group_by_launch([tensor] for tensor in tensors)
    operands = []
    for (device, _, aligned), members in groups.items():
        counts, rows = [tensors[i].numel() for i in members], [[tensors[i].data_ptr()] for i in members]
        tensor_of_chunk, table, chunks = tensor_lists.chunk_table(counts, rows, device)
        operand = torch.empty(chunks, dtype=torch.float32, device=device) if scale is None else scale
        operands.append(operand.to(device, non_blocking=True))
        if chunks:
            constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, **OPTIONS}
            with torch.cuda.device_of(table):
                kernel[(chunks,)](tensor_of_chunk, table, operands[-1], tensors[members[0]], **constants)
    return operands, [tensors[i] for i in others]


@fast_jit
def _squared_sum_kernel(
    tensor_of_chunk, table, partial, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, row, start, count = chunk_of(tensor_of_chunk, table, 4, CHUNK)
    x, lane = moving_base(tensor_of_chunk, row, start, like), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = count // BLOCK * BLOCK  # unmasked loads vectorize
    for begin in range(0, whole, BLOCK):
        value = tl.load(elements(x, begin + lane, ALIGNED)).to(tl.float32)
        total += value * value
    if whole < count:
        value = tl.load(elements(x, whole + lane, ALIGNED), mask=whole + lane < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@fast_jit
def _scale_kernel(tensor_of_chunk, table, scale, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if factor != 1.0:  # true for NaN too
        tensor, row, start, count = chunk_of(tensor_of_chunk, table, 4, CHUNK)
        x, lane = moving_base(tensor_of_chunk, row, start, like), tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK
        for begin in range(0, whole, BLOCK):
            at = elements(x, begin + lane, ALIGNED)
            store(at, tl.load(at).to(tl.float32) * factor, None)
        if whole < count:
            rest, mask = elements(x, whole + lane, ALIGNED), whole + lane < count
            store(rest, tl.load(rest, mask=mask).to(tl.float32) * factor, mask)


@fast_jit
def _tally_kernel(
    part, count, copies, bound, running, squares, scale, found_inf, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    total, lane = tl.zeros((BLOCK,), tl.float32), tl.arange(0, BLOCK)
    for begin in range(0, count, BLOCK):
        total += tl.load(part + begin + lane, mask=begin + lane < count, other=0.0)
    sum_so_far = tl.load(squares) + tl.div_rn(tl.sum(total, axis=0), copies)
    tl.store(squares, sum_so_far)
    tl.store(found_inf, tl.where(tl.abs(sum_so_far) < float("inf"), 0.0, 1.0))
    if bound is not None and running is not None:
        norm = tl.load(running)
        if OWN:
            norm = tl.maximum(norm, tl.sqrt_rn(sum_so_far))
        tl.store(scale, tl.minimum(tl.div_rn(1.0, norm + 1e-6) * bound, 1.0))
