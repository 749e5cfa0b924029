"""Will it fit, how fast will it be, and which layout is best: `plan(job, gpu)`, before any weight is read."""

from dataclasses import dataclass

from expertmesh.plan.gpus import GPU
from expertmesh.plan.layouts import Layout, layout_of
from expertmesh.plan.memory import Job


@dataclass(frozen=True)
class Plan:
    """A job on a GPU: its layout with memory and speed, and how many micro-batches a step has."""

    gpu: GPU
    layout: Layout
    micro_batches: int = 1

    @property
    def fits(self) -> bool:
        """Whether each rank's GPU has the memory."""
        return self.layout.fits(self.gpu)

    @property
    def left(self) -> int:
        """Bytes that stay free on each GPU; below zero, how many are missing."""
        return self.gpu.memory - self.layout.memory.needed


def plan(job: Job, gpu: GPU, micro_batches: int = 1) -> Plan:
    """What a job needs on each GPU of this kind, and how fast its steps of so many micro-batches are.

    Raises ValueError for sizes that do not fit each other, and for a model that cannot be planned.
    """
    return Plan(gpu, layout_of(job, gpu, micro_batches), micro_batches)
