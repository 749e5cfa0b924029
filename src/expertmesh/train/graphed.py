"""Forward and backward as one CUDA graph, for steps that the GPU runs faster than the CPU can issue them.

A training step is thousands of launches, most of them of the same kernels on the same addresses as in the step before.
`GraphedStep` records them once for each shape of a batch and then replays them with a single launch. With
4,096 tokens per GPU and experts spread over ranks the CPU is the limit otherwise.

What is recorded are launches, not Python: hooks and printing happen while recording only, never in a replay.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist

from expertmesh.dispatch.links import hosts

WARM_UP = 3  # calls that run as always: kernels are compiled, buffers and streams made


class GraphedStep:
    """`step(**batch)` does `loss = model(**batch).loss; loss.backward()` and returns the loss, without its graph.

    The first `WARM_UP` batches of a shape run as always, the next is recorded, and those after it are replayed. All
    ranks must call it at the same time; if on any rank a batch's shape is new, or gradients are there already, to be
    accumulated into, all run it as always. Gradients lie at the same addresses in every replay: a copy of one must be
    made before the next step if it is to be kept. The memory of a recorded step stays reserved for it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._stream = torch.cuda.Stream()
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, _Recorded] = {}

    def __call__(self, **batch: Any) -> torch.Tensor:
        shape = _shape_of(batch)
        fresh = all(parameter.grad is None for parameter in self.model.parameters())
        seen = _least(self._seen.get(shape, 0) if fresh else -1)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if seen < WARM_UP:
            return self._as_always(batch)
        if shape not in self._recorded:
            self._recorded[shape] = _Recorded(self.model, batch, self._stream)
        return self._recorded[shape].replay(batch)

    def _as_always(self, batch: dict[str, Any]) -> torch.Tensor:
        """On the stream of the recording, as what autograd remembers of parameters belongs to a stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.model(**batch).loss
            loss.backward()
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss.detach()


class _Recorded:
    def __init__(self, model: Any, batch: dict[str, Any], stream: torch.cuda.Stream) -> None:
        self.batch = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        # other threads look after collectives meanwhile
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = model(**self.batch).loss
            self.loss.backward()
        self.loss = self.loss.detach()
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        for name, x in batch.items():
            if isinstance(x, torch.Tensor):
                self.batch[name].copy_(x)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()


def _shape_of(batch: dict[str, Any]) -> tuple:
    return tuple((n, (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x) for n, x in sorted(batch.items()))


def _least(number: int) -> int:
    """The smallest number that any rank has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    world: Any = dist.group.WORLD
    answer = torch.tensor([number])
    dist.all_reduce(answer, dist.ReduceOp.MIN, group=hosts(world))
    return int(answer)
