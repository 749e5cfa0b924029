"""A clock that moves only when it is told to, and a model whose passes take the time that the test says."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch


class Clock:
    """Stands for the module `time`, and makes events for `torch.cuda.Event`."""

    def __init__(self) -> None:
        self.ms = 5000.0

    def takes(self, ms: float) -> None:
        """Something runs for so long."""
        self.ms += ms

    def perf_counter(self) -> float:
        return self.ms / 1e3

    def event(self, **_: Any) -> Any:
        """As torch.cuda.Event: noted when it is recorded."""
        noted = SimpleNamespace()
        noted.record = lambda: setattr(noted, "ms", self.ms)
        noted.elapsed_time = lambda end: end.ms - noted.ms
        return noted


class Ticking(torch.nn.Module):
    """A model of one weight. `passes`: milliseconds of (forward, backward), step by step."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))

    def __init__(self, clock: Clock, passes: Iterable[tuple[float, float]]):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.clock, self.passes = clock, iter(passes)

    def forward(self, **_: Any) -> Any:
        forward_ms, backward_ms = next(self.passes)
        self.clock.takes(forward_ms)
        loss = self.weight * 1
        loss.register_hook(lambda _: self.clock.takes(backward_ms))
        return SimpleNamespace(loss=loss)


#: a warm-up that would show, then steps whose medians are 3, 4 and, of their sums, 10: neither the least nor the mean
WARM_UP = [(900.0, 800.0), (700.0, 600.0)]
MEASURED = [(1.0, 9.0), (2.0, 4.0), (3.0, 30.0), (10.0, 1.0), (4.0, 2.0)]
MEDIANS = 3.0, 4.0, 10.0
