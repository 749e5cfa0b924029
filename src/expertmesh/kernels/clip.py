"""Norm and scaling of all gradients, each in one pass over memory and one launch: what clipping is made of."""

from typing import Any, NamedTuple

import torch

from expertmesh.backends import tl, use_triton
from expertmesh.kernels import tensor_lists
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.tensor_lists import chunk_of, elements, moving_base, store

OPTIONS = {"BLOCK": 4096, "num_warps": 8}


class RunningNorm(NamedTuple):
    """What is known of gradients so far, float32 scalars on their device: the sum of their squares, and by it what
    gradients are multiplied by to be clipped, and 1 where they are not finite, else 0."""

    squares: torch.Tensor
    scale: torch.Tensor
    found_inf: torch.Tensor


def add_to_norm_(
    tally: RunningNorm, tensors: list[torch.Tensor], copies: int = 1, bound: float | None = None,
    running: torch.Tensor | None = None, own: bool = False,
) -> None:  # fmt: skip
    """Adds the squares of tensors that so many ranks have, and judges by the sum, in two launches and without a sync.

    The scale is that of `clip_factor` for the norm `running` (float32 scalar), of the sum where that is larger and the
    gradient this rank's `own`, and a norm of at most `bound`; None: it is not asked for.
    """
    for part in _parts(tensors):
        if use_triton(part):
            options = {"OWN": own, "BLOCK": 1024, "num_warps": 4}
            with torch.cuda.device_of(part):
                _tally_kernel[(1,)](part, len(part), float(copies), bound, running, *tally, **options)
        else:
            add_to_norm_reference_(tally, part, copies, bound, running, own)


def add_to_norm_reference_(
    tally: RunningNorm, part: torch.Tensor, copies: int, bound: float | None, running: torch.Tensor | None, own: bool
) -> None:
    """The specification of `add_to_norm_`, behind sums of squares."""
    tally.squares.add_(part.sum() / copies)
    tally.found_inf.copy_(1.0 - torch.isfinite(tally.squares).float())
    if bound is not None and running is not None:
        norm = torch.maximum(running, tally.squares.sqrt()) if own else running
        tally.scale.copy_(clip_factor(norm, bound))


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are multiplied by, as `torch.nn.utils.clip_grad_norm_` does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def squared_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, a float32 scalar on the tensors' device; deterministic, without a sync.

    tensors: any shapes, strides and float dtypes of up to 32 bits, all on one device. Squared and summed in float32.
    """
    sums = [part.sum() for part in _parts(tensors)]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def _parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sums of squares, in float32, of which there are many."""
    parts, others = _walked(_squared_sum_kernel, tensors)
    return [squared_sum_reference(others)[None], *parts] if others or not parts else parts


def squared_sum_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The specification of `squared_sum`."""
    if not tensors:
        return torch.zeros(())
    # its root is PyTorch's norm to the last bit
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32))).square()


def scale_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiplies each tensor in place by `scale`, a float32 scalar on any device, which the host does not wait for.

    The product is rounded once, and a scale of 1 reads and writes nothing.
    """
    scale_reference_(_walked(_scale_kernel, tensors, scale)[1], scale)


def scale_reference_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """The specification of `scale_`."""
    for tensor in tensors:
        tensor *= scale.to(tensor.device, non_blocking=True)


def _walked(
    kernel: Any, tensors: list[torch.Tensor], scale: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what each launch of the kernel had beside tensors: the scale, or memory for its sums; those it cannot walk)."""
    together, others = tensor_lists.launches([tensor] for tensor in tensors)
    beside = []
    for (device, _, aligned), members in together.items():
        counts, rows = [tensors[i].numel() for i in members], [[tensors[i].data_ptr()] for i in members]
        of_chunk, table, chunks = tensor_lists.walk(counts, rows, device)
        beside_it = torch.empty(chunks, dtype=torch.float32, device=device) if scale is None else scale
        beside.append(beside_it.to(device, non_blocking=True))
        if chunks:
            constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, **OPTIONS}
            with torch.cuda.device_of(table):
                kernel[(chunks,)](of_chunk, table, beside[-1], tensors[members[0]], **constants)
    return beside, [tensors[i] for i in others]


@fast_jit
def _squared_sum_kernel(
    of_chunk, table, partial, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, row, start, count = chunk_of(of_chunk, table, 4, CHUNK)
    x, lane = moving_base(of_chunk, row, start, like), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = count // BLOCK * BLOCK  # without a mask loads are wide
    for begin in range(0, whole, BLOCK):
        value = tl.load(elements(x, begin + lane, ALIGNED)).to(tl.float32)
        total += value * value
    if whole < count:
        value = tl.load(elements(x, whole + lane, ALIGNED), mask=whole + lane < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@fast_jit
def _scale_kernel(of_chunk, table, scale, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if factor != 1.0:  # also where it is nan
        tensor, row, start, count = chunk_of(of_chunk, table, 4, CHUNK)
        x, lane = moving_base(of_chunk, row, start, like), tl.arange(0, BLOCK)
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
