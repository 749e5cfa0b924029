"""Timeouts for the collectives of a training step, and the error of a rank that waits in vain.

A process group has a fixed timeout, hours for those that Transformers creates, because loading, saving and preparing
data take long. The collectives of a step run in a `step_timeout` of minutes.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist

step_limit = timedelta(minutes=5)  # timeout of collectives in a step; a `DistributedSetup` sets it
_NCCL_MARGIN = timedelta(seconds=30)  # our errors must come before NCCL's watchdog ends the process


class RanksError(RuntimeError):
    """Raised on every rank that notices that the ranks are out of step."""


class step_timeout:
    """Reentrant context manager and decorator that limits the collectives over these groups to `step_limit`. After a
    timeout it raises RanksError with the waiting rank and `place`.
    This works for backends that raise, like gloo. NCCL only enqueues collectives: its watchdog ends the process later
    and logs the rank and the collective, but not `place`.
    """

    def __init__(self, place: str, *groups: dist.ProcessGroup) -> None:
        self.place, self.groups = place, groups
        self._backends = [entry for group in groups for entry in _backends(group)]

    def __enter__(self) -> None:
        for backend, own_timeout, margin in self._backends:
            backend._set_default_timeout(min(own_timeout, step_limit + margin))

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for backend, own_timeout, _ in self._backends:
            backend._set_default_timeout(own_timeout)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            ranks = sorted({rank for group in self.groups for rank in dist.get_process_group_ranks(group)})
            raise RanksError(
                f"Rank {dist.get_rank()} waited in vain for the ranks {ranks} at {self.place}. One of them failed, "
                f"hangs or got fewer batches: look for the first error in the logs, and where a rank without an error "
                f"hangs (py-spy dump --pid). If a rank only needs longer, raise timeout_minutes, now "
                f"{step_limit.total_seconds() / 60:g}."
            ) from None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            for backend, own_timeout, margin in self._backends:  # inlined __enter__: steps make many such calls
                backend._set_default_timeout(min(own_timeout, step_limit + margin))
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                self.__exit__(None, error, None)
                raise
            finally:
                for backend, own_timeout, _ in self._backends:
                    backend._set_default_timeout(own_timeout)

        return limited


@cache
def _backends(group: Any) -> list[tuple[Any, timedelta, timedelta]]:
    """Return (backend, its own timeout, what to add to `step_limit`) for each backend; cached for speed."""
    backends = {id(backend): backend for backend in map(group._get_backend, group._device_types)}.values()
    return [(b, b.options._timeout, _NCCL_MARGIN if b.name() == "nccl" else timedelta()) for b in backends]


def gather_on_hosts(place: str, *numbers: int) -> list[tuple[int, ...]]:
    """All-gather numbers on the CPU: for each, the tuple of its values on all ranks. All ranks pass equally many."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [(number,) for number in numbers]
    group = cpu_group(dist.group.WORLD)  # type: ignore[arg-type]
    answers = [torch.zeros(len(numbers) + 1, dtype=torch.long) for _ in range(group.size())]
    with step_timeout(place, group):
        dist.all_gather(answers, torch.tensor([*numbers, 0]), group)
    return list(zip(*(answer.tolist()[:-1] for answer in answers), strict=True))


@cache
def cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a gloo group of the same ranks with the timeout of `init_process_group`. The first call is collective."""
    world: Any = dist.group.WORLD
    timeout = world._get_backend(world._device_types[0]).options._timeout
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)
