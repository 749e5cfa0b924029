"""Predict how FSDP and expert parallelism shard parameters and gradients, by the rules of parallel/layout.py and of
Transformers. A test compares the result with real shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.kernels.packed import Packed
from expertmesh.moe.experts import is_experts
from expertmesh.parallel.clip import local_shard
from expertmesh.parallel.layout import LAYERS_AT_ONCE, SMALL
from expertmesh.plan.links import Group, Sent, group_of
from expertmesh.plan.trace import StepRecorder

if TYPE_CHECKING:
    from expertmesh.plan.memory import Job


@dataclass(frozen=True)
class Share:
    """The local shard of a parameter. elements: its size. unit: the FSDP unit, whose parameters are gathered at once.
    group: ranks that hold the other shards. copies: ranks with a replica of this shard, which all-reduce its gradient.
    gathered: FSDP gathers the full tensor for use. kept: FSDP keeps it from the forward to the backward.
    """

    elements: int
    unit: str
    group: Group = Group()
    copies: Group = Group()
    gathered: bool = False
    kept: bool = False

    def sends(self, whole: int, learns: bool) -> Iterator[Sent]:
        """Yield what FSDP sends in a step for a full tensor of `whole` bytes: an all-gather in the forward and, unless
        `kept`, in the backward, then a reduce-scatter of the gradient and an all-reduce between replicas.
        """
        gathered = (1 if self.kept else 2) + learns
        yield from [self.group.ring(whole)] * (gathered if self.gathered else 0)
        yield from [self.copies.ring(whole / self.group.size)] * (2 if learns else 0)


def shares_by_rule(model: Any, job: "Job", memory: int) -> dict[str, Share]:
    """Return {name: share} of all parameters, by rule."""
    setup, ep, per_node = job.setup(), job.ep_size, job.per_node
    of_experts = {id(parameter) for module in _experts_of(model) for parameter in module.parameters()}
    adapters = ids_added_by_peft(model)
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in of_experts | adapters)
    small = ep > 1 and dense < SMALL * memory
    replica = setup.fsdp_size * job.tp_size
    copies = group_of(range(0, job.world_size, replica), per_node)
    group = group_of(range(0, replica, job.tp_size), per_node)
    group_of_experts = group_of(range(0, replica, ep), per_node) if ep > 1 else group
    shares: dict[str, Share] = {}
    for name, parameter in model.named_parameters():
        held = local_shard(parameter)
        if id(parameter) in adapters:
            shares[name] = replicated(name, parameter, job)
        elif isinstance(held, Packed):
            shares[name] = Share(held.numel() // ep, name)
        elif id(parameter) in of_experts:
            held = parameter if ep > 1 else held  # with EP, TP does not shard experts
            rows = -(-held.shape[0] // ep // group_of_experts.size)
            elements = rows * held.shape[1:].numel()
            unit = unit_of(name, False)
            shares[name] = Share(elements, unit, group_of_experts, copies, gathered=group_of_experts.size > 1)
        else:
            kept = group.size > 1 and (small or unit_of(name, small) == "tail")
            rows = -(-held.shape[0] // group.size) if held.ndim else 1
            elements = rows * held.shape[1:].numel()
            shares[name] = Share(elements, unit_of(name, kept), group, copies, group.size > 1, kept)
    return shares


def ids_added_by_peft(model: Any) -> set[int]:
    """Return the ids of the parameters that PEFT added. They are replicated on all ranks."""
    ids = set()
    for module in model.modules():
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if isinstance(inner, torch.nn.Module):
            ids |= {id(p) for p in module.parameters()} - {id(p) for p in inner.parameters()}
    return ids


def replicated(name: str, parameter: torch.Tensor, job: "Job") -> Share:
    """Return the share of a parameter that is replicated on all ranks, which all-reduce its gradient."""
    return Share(local_shard(parameter).numel(), name, copies=group_of(range(job.world_size), job.per_node))


def keep_local_experts(model: Any, ep_size: int) -> None:
    """Cut the model's experts to those of one rank, in place."""
    for module in _experts_of(model) if ep_size > 1 else ():
        held = {name: parameter for name, parameter in module.named_parameters()}
        module.num_experts = next(iter(held.values())).shape[0] // ep_size
        for name, parameter in held.items():
            local = local_shard(parameter)
            rows = parameter.shape[0] // ep_size
            part = local.split(rows)[0] if isinstance(local, Packed) else local.new_empty(rows, *parameter.shape[1:])
            setattr(module, name, torch.nn.Parameter(part, parameter.requires_grad))


def _experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]


class Gradients:
    """Post-accumulate-grad hooks that count the memory of gradients. A full gradient lives until the reduce-scatter of
    its unit, which overlaps the next unit's backward; then only its shard stays. Full weights that FSDP kept for the
    backward are freed at the same time.
    """

    def __init__(self, watch: StepRecorder, job: "Job") -> None:
        self.watch, self.job = watch, job
        self.units: list[tuple[str, list[torch.Tensor], list[int]]] = []  # name, gradients, sizes of weights

    def of(self, share: Share) -> Any:
        """Return the hook of a parameter."""

        def hook(parameter: torch.Tensor) -> None:
            whole, parameter.grad = parameter.grad, None
            assert whole is not None
            grad = local_shard(whole)
            if share.gathered:
                if not self.units or self.units[-1][0] != share.unit:
                    for _, _, weights in self.units:
                        self.watch.count("gathered weights", -sum(weights))
                        weights.clear()
                    self.units = [*self.units[-1:], (share.unit, [], [])]
                self.units[-1][1].append(grad)
                self.units[-1][2].extend([local_shard(parameter).nbytes] if share.kept else [])
            if self.job.released or self.job.accumulates:
                return
            if share.group.size > 1:
                self.watch.count("gradients", share.elements * grad.itemsize)
            else:
                parameter.grad = whole
                self.watch.attribute(grad, "gradients")

        return hook


def unit_of(name: str, small: bool) -> str:
    """Return the FSDP unit of a parameter: a layer, a group of small layers, the embedding, or the tail."""
    number = name.partition("layers.")[2].partition(".")[0]
    if number.isdigit():
        return f"layers {int(number) // (LAYERS_AT_ONCE if small else 1)}"
    return name.rpartition(".")[0] if "embed_tokens" in name else "tail"  # all that no other unit contains
