"""Muon for hidden matrices, which orthogonalizes the momentum, and AdamW for all other weights.

    M ← M + (1 - μ)(G - M);  U = G + μ (M - G);  W ← W - lr decay W - lr r O(U)

O: five Newton-Schulz steps in bfloat16 towards the orthogonal matrix nearest to U. r: the factor of `adjust_lr_fn`.
This equals `torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/), which takes two-dimensional weights only.
The matrices of stacked experts [E, A, B] are orthogonalized one by one in batched products.

O needs whole matrices. With expert parallelism, each rank has those of its experts. For weights that FSDP or tensor
parallelism shards, each rank all-gathers U in bfloat16, one weight at a time, computes O, and keeps its shard.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _adjust_lr

from expertmesh import backends
from expertmesh.kernels.adamw import Scalar
from expertmesh.memory.adamw import AdamW, Pairs
from expertmesh.memory.states import MASTER, MOMENTUM
from expertmesh.moe.block import routers
from expertmesh.moe.experts import is_experts
from expertmesh.parallel.clip import local_shard, num_shards
from expertmesh.timeouts import step_timeout

COEFFICIENTS = DEFAULT_A, DEFAULT_B, DEFAULT_C
ADJUSTMENTS = ("match_rms_adamw", "original")


class Muon(AdamW):
    """`expertmesh.AdamW` that updates the `hidden_matrices` of a model, the group with `muon: True`, by Muon.

    model: sharded already. lr (a number) applies to all weights, weight_decay to all but norms and biases; the other
    arguments are AdamW's. adjust_lr_fn: "match_rms_adamw" scales updates to the size of AdamW's, so that its learning
    rates can be kept; "original" is the other choice of `torch.optim.Muon`. Clipping works as in AdamW.

    The only state of a hidden matrix is its momentum, in the weight's dtype. With states="float32" it is float32, and
    a bfloat16 weight has a float32 copy. Raises ValueError for 8-bit states, adapters, and models without a matrix.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
        nesterov: bool = True, adjust_lr_fn: str = ADJUSTMENTS[0], states: str | None = None, **adamw: Any,
    ) -> None:  # fmt: skip
        if states not in (None, "float32"):
            raise ValueError(f'Muon does not support states="{states}": take "float32", or None.')
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn is one of {', '.join(ADJUSTMENTS)}, not {adjust_lr_fn!r}.")
        if adamw.get("offload"):
            raise ValueError("Muon computes on the GPU: leave offload out.")
        if hasattr(model, "peft_config"):
            raise ValueError("Muon does not train the low-rank factors of adapters: train those by AdamW.")
        hidden = hidden_matrices(model)
        options = {"muon": True, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        groups: list[dict[str, Any]] = [{"params": [], **options}, {"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                decays = weight.ndim > 1 and not name.endswith("bias")
                groups[0 if weight in hidden else 1 if decays else 2]["params"].append(weight)
        if not groups[0]["params"]:
            raise ValueError(f"Muon finds no matrix to train in this {type(model).__name__}: take AdamW.")
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, states=states, **adamw)
        count = len(groups[0]["params"])
        backends.logger().info("Muon steps %d weights, AdamW the other %d.", count, len(self._all_parameters()) - count)

    @torch.no_grad()
    def update(self, pairs: Pairs, scale: Scalar = None, found_inf: Scalar = None) -> None:
        pairs = list(pairs)
        super().update([(p, group) for p, group in pairs if not group.get("muon")], scale, found_inf)
        for parameter, group in pairs:
            if group.get("muon"):
                self._step_hidden(parameter, group, scale, found_inf)

    def _step_hidden(self, parameter: nn.Parameter, group: Mapping[str, Any], scale: Scalar, found_inf: Scalar) -> None:
        state = self.prepare(parameter)
        buffer, weight = local_shard(state[MOMENTUM]), local_shard(parameter)
        gradient = self._grad(parameter, group).to(buffer.dtype)
        if scale is not None:
            gradient = gradient * scale.to(gradient.device, gradient.dtype)
        momentum = buffer.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update, lr = orthogonal_of(update, parameter), float(group["lr"])
        master = local_shard(state[MASTER]) if MASTER in state else weight
        adjusted = _adjust_lr(lr, group["adjust_lr_fn"], parameter.shape[-2:])
        stepped = (master * (1 - lr * group["weight_decay"])).add_(update, alpha=-adjusted)
        for old, new in ((buffer, momentum), (master, stepped), (state["step"], state["step"] + 1)):
            old.copy_(new if found_inf is None else torch.where(found_inf.to(old.device) != 0, old, new))
        if master is not weight:
            weight.copy_(master)


def hidden_matrices(model: Any) -> set[torch.Tensor]:
    """Return the weights of linear layers and of experts [E, A, B], without embeddings, the head and routers."""
    modules = list(model.modules())
    matrices = {module.weight for module in modules if isinstance(module, nn.Linear) and min(module.weight.shape) > 1}
    for experts in filter(is_experts, modules):
        matrices |= {weight for weight in experts.parameters(recurse=False) if weight.ndim == 3}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    excluded = [head, *(module for module in modules if isinstance(module, nn.Embedding))]
    excluded += [router for _, router in routers(model)]
    return matrices - {weight for module in excluded if module is not None for weight in module.parameters()}


def orthogonal_of(update: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return this rank's shard of O(U), in bfloat16. update: its shard of U, with the parameter's placements."""
    if num_shards(parameter) == (num_shards(parameter, 0) if parameter.ndim == 3 else 1):  # no matrix is sharded
        return orthogonal(update)
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    update, stride = update.bfloat16(), parameter.stride()
    piece = DTensor.from_local(update, mesh, placements, run_check=False, shape=shape, stride=stride)
    with step_timeout("the momentum of a matrix", *mesh.get_all_groups()):
        whole = piece.full_tensor()
    on_all = DTensor.from_local(orthogonal(whole), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return on_all.redistribute(placements=placements).to_local()


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return O of a matrix [A, B], or of each matrix of a stack [E, A, B], in bfloat16."""
    (a, b, c), add = COEFFICIENTS, torch.addmm if x.ndim == 2 else torch.baddbmm
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16().mT if is_tall else x.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(DEFAULT_NS_STEPS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
