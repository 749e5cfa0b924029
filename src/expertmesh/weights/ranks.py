"""The ranks that work on one thing together; a process of its own is rank 0 of 1."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from expertmesh.waiting import RanksError, hosts


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


def refuse_differences(of_what: str, values: Mapping[str, Any]) -> None:
    """Raise RanksError, on every rank alike, if ranks have other `values` under a key; all must ask."""
    if world_size() == 1:
        return
    everyone = gathered({key: str(value) for key, value in values.items()}, hosts(dist.group.WORLD))  # type: ignore
    for key in sorted({key for one in everyone for key in one}):
        ranks_with: dict[str, list[int]] = {}
        for number, one in enumerate(everyone):
            ranks_with.setdefault(one.get(key, "nothing"), []).append(number)
        if len(ranks_with) > 1:
            told = "; ".join(f"{value} on {', '.join(map(str, numbers))}" for value, numbers in ranks_with.items())
            raise RanksError(f"The ranks differ in {of_what}: {key} is {told}. Start all ranks with the same.")
