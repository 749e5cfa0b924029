"""Causal masks without waiting for the device.

Transformers looks at `position_ids` in every forward, on the device, to find out whether several documents are packed
into a row: the CPU waits for the GPU once per step. A caller who passes no `position_ids` has packed nothing, so
within `unpacked()` the question is answered without looking. Outside, Transformers' function is called as ever.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from transformers import masking_utils

_unpacked: ContextVar[bool] = ContextVar("unpacked", default=False)
_look = masking_utils.find_packed_sequence_indices


def _find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    return None if _unpacked.get() else _look(position_ids)


masking_utils.find_packed_sequence_indices = _find_packed_sequence_indices


@contextlib.contextmanager
def unpacked(known: bool) -> Iterator[None]:
    """While `known`, rows are known to hold one document each."""
    token = _unpacked.set(known)
    try:
        yield
    finally:
        _unpacked.reset(token)
