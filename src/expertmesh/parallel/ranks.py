"""Rank, world size and collectives of Python objects, also without torch.distributed: then this is rank 0 of 1."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from expertmesh.timeouts import RanksError, cpu_group

ALONE = object()  # in place of a process group: this process only


def rank(group: Any = None) -> int:
    """Return this process' rank in the group (None: all ranks)."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def world_size(group: Any = None) -> int:
    """Return the number of ranks in the group (None: all ranks)."""
    return dist.get_world_size(group) if group is not ALONE and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has called it."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_object(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    values = [value] * world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def check_same_on_all_ranks(of_what: str, values: Mapping[str, Any]) -> None:
    """Raise RanksError on every rank if `values` differ between ranks. All ranks must call it."""
    if world_size() == 1:
        return
    everyone = all_gather_object({key: str(value) for key, value in values.items()}, cpu_group(dist.group.WORLD))  # type: ignore
    for key in sorted({key for each in everyone for key in each}):
        ranks_with: dict[str, list[int]] = {}
        for number, each in enumerate(everyone):
            ranks_with.setdefault(each.get(key, "nothing"), []).append(number)
        if len(ranks_with) > 1:
            which = "; ".join(f"{value} on {', '.join(map(str, numbers))}" for value, numbers in ranks_with.items())
            raise RanksError(f"The ranks differ in {of_what}: {key} is {which}. Start all ranks with the same.")


@contextmanager
def fail_together(group: Any = None) -> Iterator[None]:
    """Context manager that all ranks leave together. If one rank raises inside, the others raise RanksError with its
    message."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = all_gather_object(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    if failed := [f"rank {number}: {what}" for number, what in enumerate(errors) if what is not None]:
        raise RanksError("; ".join(failed))
