"""Simulate a step on any number of ranks on one machine: the real layout on a fake process group, and a trace.

The training code lays out the model (parallel/, Transformers' meshes, FSDP2, expert and tensor parallelism) on the meta
device under a fake process group. The real shards and groups give what a rank holds and what FSDP sends; activations
and tokens sent between ranks come from the traced step (memory.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization

from expertmesh.parallel.clip import local_shard
from expertmesh.parallel.layout import fsdp_units
from expertmesh.plan import Plan
from expertmesh.plan.gpus import GPU
from expertmesh.plan.layouts import Layout
from expertmesh.plan.links import Group, Sent, group_of
from expertmesh.plan.memory import Job, adapted, base_of, memory_of, model_of, trace
from expertmesh.plan.ranks import lay_out, rank_of
from expertmesh.plan.shards import Share, ids_added_by_peft, replicated
from expertmesh.plan.speed import COMPONENTS, speed_of
from expertmesh.plan.trace import Trace

WHAT = {", FSDP": "weights and gradients", "": "tokens of experts", ", TP": "tensor parallelism"}


@dataclass(frozen=True)
class Simulation:
    """A plan from real shards. parameters: number in the full model. held: bytes on this rank of "parameters",
    "gradients" and "optimizer states", all allocated at once. sent: by this rank in a step, by purpose.
    """

    plan: Plan
    parameters: int
    held: dict[str, int]
    sent: dict[str, Sent]

    @property
    def seconds_hidden(self) -> float:
        """Communication time of weights and gradients in a step, which at best is hidden behind computation."""
        seconds = self.plan.layout.speed.seconds
        once = sum(seconds.get(COMPONENTS[f"{link}, FSDP"], 0.0) for link in Sent._fields)
        return self.plan.layout.job.passes * once


def simulate(job: Job, gpu: GPU, micro_batches: int = 1, rank: int = 0) -> Simulation:
    """Plan a job for one of its ranks; rank 0 needs the most memory. Raise ValueError as `trace` and `lay_out` do."""
    shares, total = real_shares(job, gpu.memory, rank)
    traced = trace(job, gpu.memory, shares)
    layout = Layout(job, memory_of(job, traced), speed_of(job, traced, gpu, micro_batches))
    learning = int(sum(elements * size for elements, size, learns in traced.parameters.values() if learns))
    held = {
        "parameters": int(sum(elements * size for elements, size, _ in traced.parameters.values())),
        "gradients": 0 if job.released else learning,
        "optimizer states": layout.memory.pieces["optimizer states"],
    }
    return Simulation(Plan(gpu, layout, micro_batches), total, held, _sent(traced, job.passes * micro_batches))


def real_shares(job: Job, memory: int, rank: int = 0) -> tuple[dict[str, Share], int]:
    """Return {name: share} of the real layout on a rank, and the number of parameters of the full model."""
    if job.world_size == 1:
        model = model_of(job)
        return {name: Share(parameter.numel(), name) for name, parameter in model.named_parameters()}, _count(model)
    with rank_of(job.world_size, rank):
        with initialization.no_init_weights(), initialization.meta_device_safe_creation_ops():
            model = base_of(job)
        total = _count(model)
        with torch.device("meta"):
            model = adapted(job, lay_out(model, job.setup(), memory))
        return shares_of(model, job), total


def shares_of(model: nn.Module, job: Job) -> dict[str, Share]:
    """Return {name: share} of a model that is laid out."""
    sharded: dict[int, tuple[str, Any, bool]] = {}
    for name, module in model.named_modules():
        for number, unit in enumerate(fsdp_units(module)):
            # by default FSDP does not reshard the root module after the forward
            kept = unit.post_forward_mesh_info is None or module is model
            sharded |= {id(p.sharded_param): (f"{name} {number}", unit.mesh_info, kept) for p in unit.fsdp_params}
    shares, adapters, per_node = {}, ids_added_by_peft(model), job.per_node
    for name, parameter in model.named_parameters():
        elements = local_shard(parameter).numel()
        if id(parameter) in adapters:
            shares[name] = replicated(name, parameter, job)
            continue
        if id(parameter) not in sharded:  # experts that are not sharded further
            shares[name] = Share(elements, name)
            continue
        unit, mesh, kept = sharded[id(parameter)]
        group, copies = (
            _group_of(getattr(mesh, f"{kind}_process_group", None), per_node) for kind in ("shard", "replicate")
        )
        shares[name] = Share(elements, unit, group, copies, group.size > 1, kept and group.size > 1)
    return shares


def _group_of(group: Any, per_node: int) -> Group:
    if group is None:
        return Group()
    ranks = dist.get_process_group_ranks(group)
    first = ranks.index(dist.get_rank())
    return group_of(ranks[first:] + ranks[:first], per_node)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sent(traced: Trace, micro_batches: int) -> dict[str, Sent]:
    sent = {
        name: Sent(*(micro_batches * traced.work[link + what].bytes for link in Sent._fields))
        for what, name in WHAT.items()
    }
    return {name: size for name, size in sent.items() if any(size)}
