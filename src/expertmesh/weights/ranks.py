"""The ranks that work on one thing together; a process of its own is rank 0 of 1."""

from typing import Any

import torch.distributed as dist


def rank(group: Any = None) -> int:
    """This process among the group's (None: all)."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: Any = None) -> int:
    """How many processes there are."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def barrier(group: Any = None) -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier(group)


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    values = [value] * world_size(group)
    if dist.is_initialized():
        dist.all_gather_object(values, value, group)
    return values
