"""How long a rank waits for others in a step, and what it says when they do not come.

Groups of ranks have the timeout that they were made with, of hours where Transformers made them: loading and saving
take long, and so may preparing data. The exchanges of a step have a `step_timeout` of minutes.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist

patience = timedelta(minutes=5)  # in steps; a `DistributedSetup` sets it
_FIRST = timedelta(seconds=30)  # that an error of ours is to come before NCCL's watchdog ends the process


class RanksError(RuntimeError):
    """Ranks that should do the same at the same time do not; on every rank that notices."""


class step_timeout:
    """Within, or in a function that this decorates, ranks of these groups exchange something at `place`. If a rank does
    not come, a RanksError says who waited, and where. May be entered any number of times.

    This holds for backends that raise, as gloo does. NCCL's exchanges only start here: if a rank does not come, its
    watchdog ends the process, and names the rank and the exchange, but not the place.
    """

    def __init__(self, place: str, *groups: dist.ProcessGroup) -> None:
        self.place, self.groups = place, groups
        self._backends = [one for group in groups for one in _backends(group)]

    def __enter__(self) -> None:
        for backend, usual, more in self._backends:
            backend._set_default_timeout(min(usual, patience + more))

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for backend, usual, _ in self._backends:
            backend._set_default_timeout(usual)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            ranks = sorted({rank for group in self.groups for rank in dist.get_process_group_ranks(group)})
            raise RanksError(
                f"Rank {dist.get_rank()} waited in vain for the ranks {ranks} at {self.place}. One of them failed, "
                f"stands still or got fewer batches: look at the first error of all, and where a rank without one "
                f"stands (py-spy dump --pid). If it only needs longer, raise timeout_minutes, now "
                f"{patience.total_seconds() / 60:g}."
            ) from None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            for backend, usual, more in self._backends:  # as __enter__, which would be a call more: steps make many
                backend._set_default_timeout(min(usual, patience + more))
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                self.__exit__(None, error, None)
                raise
            finally:
                for backend, usual, _ in self._backends:
                    backend._set_default_timeout(usual)

        return limited


@cache
def _backends(group: Any) -> list[tuple[Any, timedelta, timedelta]]:
    """Each with its usual timeout, and what it is given beyond our patience; asked once, as a step exchanges often."""
    found = {id(backend): backend for backend in map(group._get_backend, group._device_types)}.values()
    return [(one, one.options._timeout, _FIRST if one.name() == "nccl" else timedelta()) for one in found]


def gather_on_hosts(place: str, *numbers: int) -> list[tuple[int, ...]]:
    """Each of the numbers as all ranks have it, once every rank is here with as many. No device is waited for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [(number,) for number in numbers]
    group = cpu_group(dist.group.WORLD)  # type: ignore[arg-type]
    answers = [torch.zeros(len(numbers) + 1, dtype=torch.long) for _ in range(group.size())]
    with step_timeout(place, group):
        dist.all_gather(answers, torch.tensor([*numbers, 0]), group)
    return list(zip(*(answer.tolist()[:-1] for answer in answers), strict=True))


@cache
def cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks whose messages travel between their CPUs, with the timeout of `init_process_group`."""
    world: Any = dist.group.WORLD
    timeout = world._get_backend(world._device_types[0]).options._timeout
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)
