"""Lists of tensors that one launch walks: the kernel finds their addresses in a table on the device.

PyTorch's foreach functions pass addresses as arguments, which fit a few dozen tensors, in launches of a few hundred
blocks: too few to keep the memory of a large GPU busy. Here every `CHUNK` elements of every tensor are a program.

A table is made anew at each step, as gradients move, and copied without a wait. A tensor that has a launch for itself,
as a large weight within backward, needs none: what moves is an argument of its kernel, and its row is copied `once`. In
kernels `like` is any pointer of the type that an address stands for.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from expertmesh.backends import tl, triton, use_triton

CHUNK = 2**15  # elements of a program
MOST = 2**12  # rows and options that are remembered
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8)


def launches(lists: Iterable[Sequence[torch.Tensor]]) -> tuple[dict[tuple, list[int]], list[int]]:
    """Which members of `lists` share a launch, by what they have in common, and which no kernel can walk.

    A member is one tensor or several of the same elements (weight, gradient, ...), walked as one piece of memory: they
    must be contiguous. In common: device, dtypes, and whether all begin at a multiple of 16 bytes.
    """
    together: dict[tuple, list[int]] = {}
    others: list[int] = []
    for number, tensors in enumerate(lists):
        if use_triton(tensors[0]) and all(x.is_contiguous() and x.dtype in DTYPES for x in tensors):
            aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
            together.setdefault((tensors[0].device, *(x.dtype for x in tensors), aligned), []).append(number)
        else:
            others.append(number)
    return together, others


def walk(
    counts: Sequence[int], rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """A way through tensors of so many elements, by one copy without a wait, or none: (each chunk's tensor, None of a
    single one; a table; chunks, for as many programs).

    A row of the table is elements, first chunk, number of chunks, and one of `rows`. The first of those is the address
    that moves; of a single tensor it is not in the table: its kernel has it as the argument `like`.
    """
    chunks = [-(-count // CHUNK) for count in counts]
    if len(counts) == 1:
        return None, once((counts[0], 0, chunks[0], 0, *rows[0][1:]), torch.int64, device), chunks[0]
    table, first = [], 0
    for count, of_tensor, row in zip(counts, chunks, rows, strict=True):
        table.append([count, first, of_tensor, *row])
        first += of_tensor
    sent = _sent(torch.tensor(table), device)
    return torch.repeat_interleave(sent[:, 2].contiguous(), output_size=first), sent, first


def once(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of 64 bits on a device, copied there when a stream first asks for them. Nobody writes over them."""
    if device.type != "cuda":
        return _remembered(numbers, dtype, device, None)
    # a graph outlives what is remembered here
    send = _remembered.__wrapped__ if torch.cuda.is_current_stream_capturing() else _remembered
    return send(numbers, dtype, device, torch.cuda.current_stream(device))


@lru_cache(MOST)
def _remembered(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device, _stream: Any) -> torch.Tensor:
    return _sent(torch.tensor(numbers, dtype=dtype), device)


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    # PyTorch gives pinned memory out again only when the copy has been made, and what a CUDA graph copies from never
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def chunk_of(of_chunk, table, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's tensor, its row of the table, where in the tensor the chunk begins and how long it is."""
    tensor = 0
    if of_chunk is not None:
        tensor = tl.load(of_chunk + tl.program_id(0))
    row = table + tensor * COLUMNS
    start = (tl.program_id(0) - tl.load(row + 1)) * CHUNK  # int64: a stack of experts may have more than 2**31 elements
    return tensor, row, start, tl.minimum(tl.load(row) - start, CHUNK).to(tl.int32)


@triton.jit
def base(address, start, like):
    """Where in memory a chunk begins, as a pointer like `like`."""
    return address.to(like.dtype) + start


@triton.jit
def moving_base(of_chunk, row, start, like):
    """`base` of the address that moves, the first column of a row."""
    if of_chunk is None:
        return like + start
    else:
        return base(tl.load(row + 3), start, like)


@triton.jit
def elements(base, at, ALIGNED: tl.constexpr):
    """Pointers to the elements `at` [BLOCK] of a chunk; ALIGNED: they can be moved 16 bytes at a time, or of bytes 8,
    so that a thread has the same elements of all."""
    if ALIGNED:
        return tl.multiple_of(base + at, 8 if base.dtype.element_ty.primitive_bitwidth == 8 else 16)
    else:
        return base + at


@triton.jit
def store(pointers, values, mask):
    """Rounds float32 values once, and needs no room in the caches."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask, eviction_policy="evict_first")
