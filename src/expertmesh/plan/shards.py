"""What FSDP and expert parallelism leave of a model's parameters and gradients on one rank, by the rules of the layout.

The rules are those of parallel/layout.py and of Transformers' layout beneath it; a test compares them with real shards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.moe.experts import is_experts
from expertmesh.parallel.layout import LAYERS_AT_ONCE, SMALL
from expertmesh.plan.trace import Watch

if TYPE_CHECKING:
    from expertmesh.plan.memory import Job


@dataclass(frozen=True)
class Share:
    """What a rank holds of parameters: rows of dimension 0, a part of 1/`ranks`, the first rank the most.

    gathered: FSDP shows the whole tensor while it is used; kept: and from the forward to the backward.
    """

    ranks: int = 1
    gathered: bool = False
    kept: bool = False

    def elements(self, shape: torch.Size) -> int:
        """Elements of the largest shard of a tensor."""
        rows = -(-shape[0] // self.ranks) if len(shape) else 1
        return rows * shape[1:].numel()


def spread(model: Any, job: "Job", memory: int) -> dict[str, Share]:
    """Cut the model's experts to this rank's, and say what FSDP does with every parameter: {name: share}."""
    setup, ep = job.setup(), job.ep_size
    experts = [module for module in model.modules() if is_experts(module)]
    of_experts = {id(parameter) for module in experts for parameter in module.parameters()}
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in of_experts)
    replica = setup.fsdp_size
    small = ep > 1 and dense < SMALL * memory
    shares: dict[str, Share] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in of_experts:
            ranks = replica // ep if ep > 1 else setup.fsdp_size
            shares[name] = Share(ranks, gathered=ranks > 1)
        else:
            kept = setup.fsdp_size > 1 and (small or unit_of(name, small) == "tail")
            shares[name] = Share(setup.fsdp_size, setup.fsdp_size > 1, kept)
    for module in experts if ep > 1 else ():
        held = {name: parameter for name, parameter in module.named_parameters()}
        module.num_experts = next(iter(held.values())).shape[0] // ep
        for name, parameter in held.items():
            part = parameter.new_empty(parameter.shape[0] // ep, *parameter.shape[1:])
            setattr(module, name, torch.nn.Parameter(part, parameter.requires_grad))
    return shares


class Gradients:
    """What becomes of a gradient that is complete, as autograd's hook of each parameter.

    A sharded one waits for its unit's reduce-scatter, which runs beside the next unit's backward, and then is a shard.
    Whole weights that FSDP kept for the backward are freed behind it.
    """

    def __init__(self, watch: Watch, job: "Job") -> None:
        self.watch, self.job = watch, job
        self.units: list[tuple[str, list[torch.Tensor], list[int]]] = []  # name, gradients, sizes of weights

    def of(self, unit: str, share: Share) -> Any:
        """The hook of a parameter of this unit."""

        def came(parameter: torch.Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            if share.gathered:
                if not self.units or self.units[-1][0] != unit:
                    for _, _, weights in self.units:
                        self.watch.take("gathered weights", -sum(weights))
                        weights.clear()
                    self.units = [*self.units[-1:], (unit, [], [])]
                self.units[-1][1].append(grad)
                self.units[-1][2].extend([parameter.nbytes] if share.kept else [])
            if self.job.released or self.job.accumulates:
                return
            if share.ranks > 1:
                self.watch.take("gradients", share.elements(parameter.shape) * grad.itemsize)
            else:
                parameter.grad = grad
                self.watch.own(grad, "gradients")

        return came


def unit_of(name: str, small: bool) -> str:
    """The parameters that FSDP gathers together with this one: a layer's, several small layers', or those behind."""
    number = name.partition("layers.")[2].partition(".")[0]
    if number.isdigit():
        return f"layers {int(number) // (LAYERS_AT_ONCE if small else 1)}"
    return name.rpartition(".")[0] if "embed" in name else "tail"
