"""What FSDP and expert parallelism leave of a model's parameters and gradients on one rank, by the rules of the layout.

The rules are those of parallel/layout.py and of Transformers' layout beneath it; a test compares them with real shards.
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
from expertmesh.plan.trace import Watch

if TYPE_CHECKING:
    from expertmesh.plan.memory import Job


@dataclass(frozen=True)
class Share:
    """What a rank holds of a parameter: so many elements, as do the `copies` of it, whose gradients are added up.

    unit: all that FSDP gathers together. group: ranks that have the other shards. gathered: FSDP shows the whole tensor
    while it is used; kept: and from the forward to the backward.
    """

    elements: int
    unit: str
    group: Group = Group()
    copies: Group = Group()
    gathered: bool = False
    kept: bool = False

    def sends(self, whole: int, learns: bool) -> Iterator[Sent]:
        """What FSDP exchanges in a step, of a tensor of `whole` bytes: it is gathered for the forward and, unless it
        was kept, for the backward; then its gradients are summed to shards, and those of copies added up.
        """
        gathered = (1 if self.kept else 2) + learns
        yield from [self.group.ring(whole)] * (gathered if self.gathered else 0)
        yield from [self.copies.ring(whole / self.group.size)] * (2 if learns else 0)


def spread(model: Any, job: "Job", memory: int) -> dict[str, Share]:
    """What FSDP does with every parameter, by rule: {name: share}."""
    setup, ep, per_node = job.setup(), job.ep_size, job.per_node
    of_experts = {id(parameter) for module in _experts_of(model) for parameter in module.parameters()}
    more = added(model)
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in of_experts | more)
    small = ep > 1 and dense < SMALL * memory
    replica = setup.fsdp_size * job.tp_size
    copies = group_of(range(0, job.world_size, replica), per_node)
    group = group_of(range(0, replica, job.tp_size), per_node)
    group_of_experts = group_of(range(0, replica, ep), per_node) if ep > 1 else group
    shares: dict[str, Share] = {}
    for name, parameter in model.named_parameters():
        held = local_shard(parameter)
        if id(parameter) in more:
            shares[name] = whole(name, parameter, job)
        elif isinstance(held, Packed):
            shares[name] = Share(held.numel() // ep, name)
        elif id(parameter) in of_experts:
            held = parameter if ep > 1 else held  # they are whole then, whatever tp_size is
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


def added(model: Any) -> set[int]:
    """The ids of the parameters that PEFT added, which are on every rank."""
    found = set()
    for module in model.modules():
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if isinstance(inner, torch.nn.Module):
            found |= {id(p) for p in module.parameters()} - {id(p) for p in inner.parameters()}
    return found


def whole(name: str, parameter: torch.Tensor, job: "Job") -> Share:
    """The share of a parameter that every rank has, and of which all average the gradient."""
    return Share(local_shard(parameter).numel(), name, copies=group_of(range(job.world_size), job.per_node))


def cut_experts(model: Any, ep_size: int) -> None:
    """Leave of the model's experts those of one rank."""
    for module in _experts_of(model) if ep_size > 1 else ():
        held = {name: parameter for name, parameter in module.named_parameters()}
        module.num_experts = next(iter(held.values())).shape[0] // ep_size
        for name, parameter in held.items():
            here = local_shard(parameter)
            rows = parameter.shape[0] // ep_size
            part = here.split(rows)[0] if isinstance(here, Packed) else here.new_empty(rows, *parameter.shape[1:])
            setattr(module, name, torch.nn.Parameter(part, parameter.requires_grad))


def _experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]


class Gradients:
    """What becomes of a gradient that is complete, as autograd's hook of each parameter.

    A sharded one waits for its unit's reduce-scatter, which runs beside the next unit's backward, and then is a shard.
    Whole weights that FSDP kept for the backward are freed behind it.
    """

    def __init__(self, watch: Watch, job: "Job") -> None:
        self.watch, self.job = watch, job
        self.units: list[tuple[str, list[torch.Tensor], list[int]]] = []  # name, gradients, sizes of weights

    def of(self, share: Share) -> Any:
        """The hook of a parameter."""

        def came(parameter: torch.Tensor) -> None:
            whole, parameter.grad = parameter.grad, None
            assert whole is not None
            grad = local_shard(whole)
            if share.gathered:
                if not self.units or self.units[-1][0] != share.unit:
                    for _, _, weights in self.units:
                        self.watch.take("gathered weights", -sum(weights))
                        weights.clear()
                    self.units = [*self.units[-1:], (share.unit, [], [])]
                self.units[-1][1].append(grad)
                self.units[-1][2].extend([local_shard(parameter).nbytes] if share.kept else [])
            if self.job.released or self.job.accumulates:
                return
            if share.group.size > 1:
                self.watch.take("gradients", share.elements * grad.itemsize)
            else:
                parameter.grad = whole
                self.watch.own(grad, "gradients")

        return came


def unit_of(name: str, small: bool) -> str:
    """The parameters that FSDP gathers together with this one: a layer's, several small layers', or those behind."""
    number = name.partition("layers.")[2].partition(".")[0]
    if number.isdigit():
        return f"layers {int(number) // (LAYERS_AT_ONCE if small else 1)}"
    return name.rpartition(".")[0] if "embed_tokens" in name else "tail"  # others are in no plan for FSDP
