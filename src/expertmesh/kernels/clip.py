"""Norm and scaling of all gradients, each in one pass over memory: what clipping to a norm is made of.

PyTorch's foreach functions walk lists of tensors in launches of a few hundred blocks, too few to keep the memory of a
large GPU busy. Here a tensor of many elements has a launch of its own; small ones stay with PyTorch, in one call.
"""

import torch

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched

LARGE = 2**20  # elements from which a tensor is worth a launch
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = {"BLOCK": 4096, "STEPS": 8, "num_warps": 8}  # a program takes STEPS blocks in a row


def squared_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, a float32 scalar on the tensors' device; deterministic, without a sync.

    tensors: any shapes, strides and float dtypes of up to 32 bits, all on one device. Squared and summed in float32.
    """
    large, small = _by_size(tensors)
    if not large:
        return squared_sum_reference(small)
    programs = [_programs(tensor) for tensor in large]
    partials = torch.empty(sum(programs), dtype=torch.float32, device=large[0].device)
    for tensor, partial, count in zip(large, partials.split(programs), programs, strict=True):
        _squared_sum_kernel[(count,)](tensor, partial, tensor.numel(), **OPTIONS)
    total = partials.sum()
    return total + squared_sum_reference(small) if small else total


def squared_sum_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The specification of `squared_sum`."""
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).square().sum()


def scale_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiplies each tensor in place by `scale`, a float32 scalar on their device, which the host does not wait for.

    Large tensors: the product is rounded once, and a scale of 1 reads and writes none of them.
    """
    large, small = _by_size(tensors)
    for tensor in large:
        _scale_kernel[(_programs(tensor),)](tensor, scale, tensor.numel(), **OPTIONS)
    scale_reference_(small, scale)


def scale_reference_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """The specification of `scale_`."""
    if tensors:
        torch._foreach_mul_(tensors, scale)


def _by_size(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those that have a launch of their own, and all others."""
    large: list[torch.Tensor] = []
    small: list[torch.Tensor] = []
    for tensor in tensors:
        alone = tensor.numel() >= LARGE and tensor.dtype in DTYPES and use_triton(tensor) and _is_dense(tensor)
        (large if alone else small).append(tensor)
    return large, small


def _is_dense(tensor: torch.Tensor) -> bool:
    """True where the elements fill one piece of memory, in whatever order of dimensions: only then are strides kept."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _programs(tensor: torch.Tensor) -> int:
    return triton.cdiv(tensor.numel(), OPTIONS["BLOCK"] * OPTIONS["STEPS"])


@launched
def _squared_sum_kernel(x, partial, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        value = tl.load(x + at + step * BLOCK, mask=at + step * BLOCK < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@launched
def _scale_kernel(x, scale, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    factor = tl.load(scale)
    if factor != 1.0:  # also where it is nan
        at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
        for step in range(STEPS):
            mask = at + step * BLOCK < count
            value = tl.load(x + at + step * BLOCK, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(x + at + step * BLOCK, value.to(x.dtype.element_ty), mask=mask)
