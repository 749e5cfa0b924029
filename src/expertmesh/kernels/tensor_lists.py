"""Multi-tensor launches: one kernel processes a list of tensors whose addresses are in a table on the device.

PyTorch's foreach functions pass addresses as kernel arguments. Those hold a few dozen tensors per launch, and a few
hundred blocks are too few to saturate the memory of a large GPU. Here each program processes `CHUNK` elements of a
tensor.

The table is rebuilt at each step, because gradients move, and copied asynchronously. A tensor with a launch of its own,
such as a large weight updated within backward, needs no new table: the gradient is a kernel argument and the rest is
cached on the device. In kernels, `like` is a pointer whose type an address is cast to.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from expertmesh.backends import tl, triton, use_triton

CHUNK = 2**15  # elements per program
MAX_CACHED = 2**12  # tables on devices
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8)


def group_by_launch(lists: Iterable[Sequence[torch.Tensor]]) -> tuple[dict[tuple, list[int]], list[int]]:
    """Return the indices into `lists` that share a launch, by (device, *dtypes, aligned), and those without a kernel.

    A member of `lists` is one tensor, or several of the same size (weight, gradient, ...). A kernel treats each as flat
    memory, so all must be contiguous. aligned: all begin at a multiple of 16 bytes.
    """
    groups: dict[tuple, list[int]] = {}
    others: list[int] = []
    for index, tensors in enumerate(lists):
        if use_triton(tensors[0]) and all(x.is_contiguous() and x.dtype in DTYPES for x in tensors):
            aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
            groups.setdefault((tensors[0].device, *(x.dtype for x in tensors), aligned), []).append(index)
        else:
            others.append(index)
    return groups, others


def chunk_table(
    counts: Sequence[int], rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """Return (tensor index of each chunk, or None for a single tensor; table; number of chunks = programs to launch).

    counts: elements of each tensor. A table row is (elements, first chunk, number of chunks, *row of `rows`). Each row
    of `rows` begins with the address that may change from call to call. A single tensor's table has 0 there, so that it
    can be cached, and its kernel takes that address as the argument `like`. The host does not wait for the copy.
    """
    chunks = [-(-count // CHUNK) for count in counts]
    if len(counts) == 1:
        return None, cached_on_device((counts[0], 0, chunks[0], 0, *rows[0][1:]), torch.int64, device), chunks[0]
    table, total = [], 0
    for count, tensor_chunks, row in zip(counts, chunks, rows, strict=True):
        table.append([count, total, tensor_chunks, *row])
        total += tensor_chunks
    on_device = _to_device(torch.tensor(table), device)
    return torch.repeat_interleave(on_device[:, 2].contiguous(), output_size=total), on_device, total


def cached_on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `numbers` as a 64-bit tensor on `device`, cached per stream. The caller must not write to it."""
    if device.type != "cuda":
        return _cached(numbers, dtype, device, None)
    # not cached while a CUDA graph is captured: the graph may outlive the cache entry
    copy = _cached.__wrapped__ if torch.cuda.is_current_stream_capturing() else _cached
    return copy(numbers, dtype, device, torch.cuda.current_stream(device))


@lru_cache(MAX_CACHED)
def _cached(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device, _stream: Any) -> torch.Tensor:
    return _to_device(torch.tensor(numbers, dtype=dtype), device)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    # PyTorch reuses pinned memory only after the copy has finished, and never if a captured CUDA graph copies from it
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def chunk_of(tensor_of_chunk, table, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Return this program's tensor index, its table row, the chunk's offset in the tensor and its length."""
    tensor = 0
    if tensor_of_chunk is not None:
        tensor = tl.load(tensor_of_chunk + tl.program_id(0))
    row = table + tensor * COLUMNS
    start = (tl.program_id(0) - tl.load(row + 1)) * CHUNK  # int64: stacked experts may exceed 2**31 elements
    return tensor, row, start, tl.minimum(tl.load(row) - start, CHUNK).to(tl.int32)


@triton.jit
def base(address, start, like):
    """Return a pointer of the type of `like` to element `start` at `address`."""
    return address.to(like.dtype) + start


@triton.jit
def moving_base(tensor_of_chunk, row, start, like):
    """Return `base` for the address that may change between calls; `like` itself holds it if there is one tensor."""
    if tensor_of_chunk is None:
        return like + start
    else:
        return base(tl.load(row + 3), start, like)


@triton.jit
def elements(base, at, ALIGNED: tl.constexpr):
    """Return pointers to the elements `at` [BLOCK] of a chunk. ALIGNED: a thread may access 16 bytes at a time, or 8
    of one-byte dtypes, so that it gets the same elements of every tensor."""
    if ALIGNED:
        return tl.multiple_of(base + at, 8 if base.dtype.element_ty.primitive_bitwidth == 8 else 16)
    else:
        return base + at


@triton.jit
def store(pointers, values, mask):
    """Store float32 values, rounded to the pointers' dtype. evict_first: they are not read again soon."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask, eviction_policy="evict_first")
