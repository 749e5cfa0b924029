"""Which layouts of a job fit a GPU, the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expertmesh.moe.experts import is_experts
from expertmesh.plan.gpus import GPU
from expertmesh.plan.memory import Job, Memory, memory_of, model_of, trace
from expertmesh.plan.speed import Speed, speed_of
from expertmesh.plan.trace import Trace

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
    """Layouts that fit, by tokens per second: every ep_size, with and without recomputation, by the job's optimizer and
    a smaller one, micro-batches of 1, 2, 4, ... rows. Steps have one micro-batch.
    """
    found = [
        layout
        for ep_size in ep_sizes(job)
        for recompute in (False, True)
        for layout in _batches(replace(job, ep_size=ep_size, recompute=recompute, accumulates=False), gpu)
    ]
    return sorted(found, key=lambda layout: -layout.speed.tokens_per_second)


def ep_sizes(job: Job) -> list[int]:
    """Sizes that divide the experts and the ranks of a replica, and that tp_size divides."""
    counts = [next(module.parameters()).shape[0] for module in model_of(job).modules() if is_experts(module)]
    replica = job.world_size // job.dp_replicate_size
    sizes = [size for size in range(1, replica + 1) if replica % size == 0 and (size == 1 or size % job.tp_size == 0)]
    return [size for size in sizes if size == 1 or (counts and all(count % size == 0 for count in counts))]


def _batches(job: Job, gpu: GPU) -> Iterator[Layout]:
    rows, before = 1, 0.0
    while rows <= MOST_ROWS:
        job = replace(job, batch=rows)
        found = trace(job, gpu.memory)
        jobs = [replace(job, optimizer=name) for name in dict.fromkeys((job.optimizer, SMALL_STATES))]
        fitting = [layout for layout in (_layout(one, found, gpu) for one in jobs) if layout.fits(gpu)]
        yield from fitting
        best = max((layout.speed.tokens_per_second for layout in fitting), default=0.0)
        if best < GAIN * before or not fitting:
            return
        rows, before = 2 * rows, best
