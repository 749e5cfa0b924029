"""Search for the layouts of a job that fit a GPU, fastest first."""

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
MOST_ROWS = 64  # largest micro-batch that is tried
GAIN = 1.01  # the search stops if a larger micro-batch is not this much faster


@dataclass(frozen=True)
class Layout:
    """A job with its predicted memory and speed."""

    job: Job
    memory: Memory
    speed: Speed

    def fits(self, gpu: GPU) -> bool:
        """Return whether the job fits in the memory of each GPU."""
        return self.memory.needed <= gpu.memory


def layout_of(job: Job, gpu: GPU, micro_batches: int = 1) -> Layout:
    """Predict the memory and speed of this job. Raise ValueError as `trace` does."""
    return _layout(job, trace(job, gpu.memory), gpu, micro_batches)


def _layout(job: Job, traced: Trace, gpu: GPU, micro_batches: int = 1) -> Layout:
    return Layout(job, memory_of(job, traced), speed_of(job, traced, gpu, micro_batches))


def search(job: Job, gpu: GPU) -> list[Layout]:
    """Return the layouts that fit, sorted by tokens per second. They cover every ep_size and micro-batches of 1, 2, 4,
    ... rows, with the job's optimizer and 8-bit states, and recompute as little as fits. A step is one micro-batch.
    """
    layouts: list[Layout] = []
    for ep_size in ep_sizes(job):
        base = replace(job, ep_size=ep_size, accumulates=False)
        num_layers, levels = _levels(base)
        tried: dict[tuple[int, str], Layout] = {}  # (rows, optimizer) -> the last layout tried
        for level in levels:
            too_large = [rows for (rows, _), layout in tried.items() if not layout.fits(gpu)]
            if too_large or not tried:
                _batches(replace(base, recompute=level), gpu, min(too_large, default=1), tried, num_layers)
        layouts += [layout for layout in tried.values() if layout.fits(gpu)]
    return sorted(layouts, key=lambda layout: -layout.speed.tokens_per_second)


def fastest(job: Job, gpu: GPU, sizes: list[int], rows: list[int], memory: float, micro_batches: int) -> Layout | None:
    """Return the fastest layout with these ep_sizes and micro-batch rows that needs at most `memory` bytes, or None.
    Rows are tried in order until one does not fit or is slower than `GAIN` times the previous one.
    """
    layouts: list[Layout] = []
    for ep_size in sizes:
        before = 0.0
        for batch in rows:
            layout = layout_of(replace(job, ep_size=ep_size, batch=batch), gpu, micro_batches)
            if layout.memory.needed > memory or layout.speed.tokens_per_second < GAIN * before:
                break
            layouts.append(layout)
            before = layout.speed.tokens_per_second
    return max(layouts, key=lambda layout: layout.speed.tokens_per_second, default=None)


def ep_sizes(job: Job) -> list[int]:
    """Return 1 and the multiples of tp_size that divide the number of experts and the ranks of a replica."""
    counts = [next(module.parameters()).shape[0] for module in model_of(job).modules() if is_experts(module)]
    replica = job.world_size // job.dp_replicate_size
    sizes = [size for size in range(1, replica + 1) if replica % size == 0 and (size == 1 or size % job.tp_size == 0)]
    return [size for size in sizes if size == 1 or (counts and all(count % size == 0 for count in counts))]


def _levels(job: Job) -> tuple[int, list[Any]]:
    """Return the number of layers of the job's model and its recompute levels, from least to most recomputation."""
    model, levels = model_of(job), list[Any]()
    for level in (False, "light", "experts", True, "offload"):
        with quiet(), contextlib.suppress(ValueError):  # the model does not support this level
            recompute(model, level)
            levels.append(level)
    return sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()), levels


def _batches(job: Job, gpu: GPU, rows: int, tried: dict[tuple[int, str], Layout], num_layers: int) -> None:
    """Try micro-batches of `rows`, 2·`rows`, ... while they get faster. Layouts in `tried` that fit are kept."""
    before = 0.0
    while rows <= MOST_ROWS:
        traced, best = trace(replace(job, batch=rows), gpu.memory), 0.0
        for name in dict.fromkeys((job.optimizer, SMALL_STATES)):
            layout, less = _layout(replace(job, batch=rows, optimizer=name), traced, gpu), tried.get((rows, name))
            if less is None or not less.fits(gpu):
                tried[rows, name] = (less and layout.fits(gpu) and _partly(less, layout, num_layers, gpu)) or layout
            best = max(best, layout.speed.tokens_per_second if layout.fits(gpu) else 0.0)
        if best < GAIN * before or not best:
            return
        rows, before = 2 * rows, best


def _partly(less: Layout, more: Layout, num_layers: int, gpu: GPU) -> Layout | None:
    """Return a layout that fits between `less`, which does not fit, and `more`, which does, or None. Its first layers
    recompute as `more`, the others as `less`. It assumes equal savings per layer and otherwise tries two layers more.
    """
    missing = less.memory.needed - gpu.memory
    first = max(1, math.ceil(num_layers * missing / (less.memory.needed - more.memory.needed)))
    level = "full" if more.job.recompute is True else str(more.job.recompute)
    for number in range(first, min(first + 3, num_layers)):
        layout = layout_of(replace(more.job, recompute={level: number}), gpu)
        if layout.fits(gpu):
            return layout
    return None
