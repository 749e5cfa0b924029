"""Predict memory and speed of a training job before any weight is read: `plan(job, gpu)`."""

from dataclasses import dataclass

from expertmesh.plan.gpus import GPU
from expertmesh.plan.layouts import Layout, layout_of
from expertmesh.plan.memory import Job


@dataclass(frozen=True)
class Plan:
    """A job on a kind of GPU: its layout with memory and speed, and the number of micro-batches in a step."""

    gpu: GPU
    layout: Layout
    micro_batches: int = 1

    @property
    def fits(self) -> bool:
        """Whether the job fits in the memory of each GPU."""
        return self.layout.fits(self.gpu)

    @property
    def left(self) -> int:
        """Free bytes on each GPU. A negative number of bytes is missing."""
        return self.gpu.memory - self.layout.memory.needed


def plan(job: Job, gpu: GPU, micro_batches: int = 1) -> Plan:
    """Predict the memory on each GPU of this kind and the time of a step of `micro_batches` micro-batches.
    Raise ValueError for incompatible sizes and for a model that cannot be planned.
    """
    return Plan(gpu, layout_of(job, gpu, micro_batches), micro_batches)
