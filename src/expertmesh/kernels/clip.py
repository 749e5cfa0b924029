"""Norm and scaling of all gradients, each in one pass over memory and one launch: what clipping is made of."""

import torch

from expertmesh.backends import tl
from expertmesh.kernels import tensor_lists
from expertmesh.kernels.launch import launched
from expertmesh.kernels.tensor_lists import base, chunk_of, elements, store

OPTIONS = {"BLOCK": 4096, "num_warps": 8}


def squared_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, a float32 scalar on the tensors' device; deterministic, without a sync.

    tensors: any shapes, strides and float dtypes of up to 32 bits, all on one device. Squared and summed in float32.
    """
    together, others = tensor_lists.launches([tensor] for tensor in tensors)
    sums = [squared_sum_reference([tensors[i] for i in others])] if others or not together else []
    for (device, _, aligned), members in together.items():
        of_chunk, table, like = _walk([tensors[i] for i in members], device)
        partial = torch.empty(len(of_chunk), dtype=torch.float32, device=device)
        if len(of_chunk):
            constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, **OPTIONS}
            with torch.cuda.device_of(partial):
                _squared_sum_kernel[(len(of_chunk),)](of_chunk, table, partial, like, **constants)
        sums.append(partial.sum())
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def squared_sum_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The specification of `squared_sum`."""
    if not tensors:
        return torch.zeros(())
    # its root is PyTorch's norm to the last bit
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32))).square()


def scale_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiplies each tensor in place by `scale`, a float32 scalar on their device, which the host does not wait for.

    The product is rounded once, and a scale of 1 reads and writes nothing.
    """
    together, others = tensor_lists.launches([tensor] for tensor in tensors)
    for (device, _, aligned), members in together.items():
        of_chunk, table, like = _walk([tensors[i] for i in members], device)
        if len(of_chunk):
            constants = {"ALIGNED": aligned, "CHUNK": tensor_lists.CHUNK, **OPTIONS}
            with torch.cuda.device_of(like):
                _scale_kernel[(len(of_chunk),)](of_chunk, table, scale, like, **constants)
    scale_reference_([tensors[i] for i in others], scale)


def scale_reference_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """The specification of `scale_`."""
    if tensors:
        torch._foreach_mul_(tensors, scale)


def _walk(tensors: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts, rows = [x.numel() for x in tensors], [[x.data_ptr()] for x in tensors]
    of_chunk, table, _ = tensor_lists.on_device(counts, rows, device)
    return of_chunk, table, tensors[0]


@launched
def _squared_sum_kernel(
    of_chunk, table, partial, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, row, start, count = chunk_of(of_chunk, table, 4, CHUNK)
    x, lane = base(tl.load(row + 3), start, like), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = count // BLOCK * BLOCK  # without a mask loads are wide
    for begin in range(0, whole, BLOCK):
        value = tl.load(elements(x, begin + lane, ALIGNED)).to(tl.float32)
        total += value * value
    if whole < count:
        value = tl.load(elements(x, whole + lane, ALIGNED), mask=whole + lane < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@launched
def _scale_kernel(of_chunk, table, scale, like, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if factor != 1.0:  # also where it is nan
        tensor, row, start, count = chunk_of(of_chunk, table, 4, CHUNK)
        x, lane = base(tl.load(row + 3), start, like), tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK
        for begin in range(0, whole, BLOCK):
            at = elements(x, begin + lane, ALIGNED)
            store(at, tl.load(at).to(tl.float32) * factor, None)
        if whole < count:
            rest, mask = elements(x, whole + lane, ALIGNED), whole + lane < count
            store(rest, tl.load(rest, mask=mask).to(tl.float32) * factor, mask)
