"""Which layouts of a job fit a GPU, the fastest first."""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from expertmesh.moe.experts import is_experts
from expertmesh.parallel.setup import recompute
from expertmesh.plan.gpus import GPU
from expertmesh.plan.memory import Job, Memory, memory_of, model_of, trace
from expertmesh.plan.speed import Speed, speed_of
from expertmesh.plan.trace import Trace, quiet

SMALL_STATES = "adamw-8bit"
MOST_ROWS = 64  # of a micro-batch
GAIN = 1.01  # a larger micro-batch must be so much faster, or larger ones are not tried


@dataclass(frozen=True)
class Layout:
    """A job with what it needs and how fast it is."""

    job: Job
    memory: Memory
    speed: Speed

    def fits(self, gpu: GPU) -> bool:
        """Whether a rank's GPU has that much memory."""
        return self.memory.needed <= gpu.memory


def layout_of(job: Job, gpu: GPU, micro_batches: int = 1) -> Layout:
    """What this job needs and how fast it is. Raises ValueError as `trace`."""
    return _layout(job, trace(job, gpu.memory), gpu, micro_batches)


def _layout(job: Job, found: Trace, gpu: GPU, micro_batches: int = 1) -> Layout:
    return Layout(job, memory_of(job, found), speed_of(job, found, gpu, micro_batches))


def search(job: Job, gpu: GPU) -> list[Layout]:
    """Layouts that fit, by tokens per second: every ep_size, micro-batches of 1, 2, 4, ... rows, by the job's optimizer
    and a smaller one, recomputing as little as fits. Steps have one micro-batch.
    """
    found: list[Layout] = []
    for ep_size in ep_sizes(job):
        one = replace(job, ep_size=ep_size, accumulates=False)
        num_layers, levels = _levels(one)
        tried: dict[tuple[int, str], Layout] = {}  # (rows, optimizer) -> the last that was tried
        for level in levels:
            lacking = [rows for (rows, _), layout in tried.items() if not layout.fits(gpu)]
            if lacking or not tried:
                _batches(replace(one, recompute=level), gpu, min(lacking, default=1), tried, num_layers)
        found += [layout for layout in tried.values() if layout.fits(gpu)]
    return sorted(found, key=lambda layout: -layout.speed.tokens_per_second)


def fastest(job: Job, gpu: GPU, sizes: list[int], rows: list[int], memory: float, micro_batches: int) -> Layout | None:
    """The fastest that needs at most so many bytes: of these ep_sizes, with micro-batches of so many rows, of which
    larger ones are tried as long as that pays.
    """
    found: list[Layout] = []
    for ep_size in sizes:
        before = 0.0
        for batch in rows:
            layout = layout_of(replace(job, ep_size=ep_size, batch=batch), gpu, micro_batches)
            if layout.memory.needed > memory or layout.speed.tokens_per_second < GAIN * before:
                break
            found.append(layout)
            before = layout.speed.tokens_per_second
    return max(found, key=lambda layout: layout.speed.tokens_per_second, default=None)


def ep_sizes(job: Job) -> list[int]:
    """Sizes that divide the experts and the ranks of a replica, and that tp_size divides."""
    counts = [next(module.parameters()).shape[0] for module in model_of(job).modules() if is_experts(module)]
    replica = job.world_size // job.dp_replicate_size
    sizes = [size for size in range(1, replica + 1) if replica % size == 0 and (size == 1 or size % job.tp_size == 0)]
    return [size for size in sizes if size == 1 or (counts and all(count % size == 0 for count in counts))]


def _levels(job: Job) -> tuple[int, list[Any]]:
    """How many layers the job's model has, and what it can recompute, the least first."""
    model, levels = model_of(job), list[Any]()
    for level in (False, "light", "experts", True, "offload"):
        with quiet(), contextlib.suppress(ValueError):  # it has nothing for this level
            recompute(model, level)
            levels.append(level)
    return sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()), levels


def _batches(job: Job, gpu: GPU, rows: int, tried: dict[tuple[int, str], Layout], num_layers: int) -> None:
    """Try the job with micro-batches from so many rows on, as long as that pays. What fitted before recomputes less and
    stays.
    """
    before = 0.0
    while rows <= MOST_ROWS:
        found, best = trace(replace(job, batch=rows), gpu.memory), 0.0
        for name in dict.fromkeys((job.optimizer, SMALL_STATES)):
            layout, less = _layout(replace(job, batch=rows, optimizer=name), found, gpu), tried.get((rows, name))
            if less is None or not less.fits(gpu):
                tried[rows, name] = (less and layout.fits(gpu) and _partly(less, layout, num_layers, gpu)) or layout
            best = max(best, layout.speed.tokens_per_second if layout.fits(gpu) else 0.0)
        if best < GAIN * before or not best:
            return
        rows, before = 2 * rows, best


def _partly(less: Layout, more: Layout, num_layers: int, gpu: GPU) -> Layout | None:
    """Between a layout that does not fit and one that recomputes more and fits: the first layers like this one, the
    others like the first. What a layer saves is the same for all; where that misses, a few layers more are tried.
    """
    lack = less.memory.needed - gpu.memory
    first = max(1, math.ceil(num_layers * lack / (less.memory.needed - more.memory.needed)))
    level = "full" if more.job.recompute is True else str(more.job.recompute)
    for number in range(first, min(first + 3, num_layers)):
        layout = layout_of(replace(more.job, recompute={level: number}), gpu)
        if layout.fits(gpu):
            return layout
    return None
