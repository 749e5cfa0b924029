"""Changes to Transformers' FSDP2 layout: less FSDP work with expert parallelism, timeouts for FSDP's collectives, and
synchronization of adapters that are added after the layout.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed import fsdp as stock_fsdp

from expertmesh.backends import device_memory
from expertmesh.kernels.packed import packed_in
from expertmesh.moe.experts import NAME, Dispatch, is_experts, uses_fast_experts
from expertmesh.moe.lora import adapter_sources
from expertmesh.timeouts import gather_on_hosts, step_timeout

SMALL = 1 / 30  # of the device's memory: dense weights below it stay gathered from forward to backward
LAYERS_AT_ONCE = 8  # in one FSDP unit, if the dense weights are `SMALL`
_AVERAGED = "_replicated_grad_hook_registered"  # Transformers sets it on parameters whose gradients it averages


@contextmanager
def expert_parallel_fsdp(model: Any, layout: DistributedConfig) -> Iterator[None]:
    """Context manager around Transformers' sharding of a model, which changes what FSDP shards with expert parallelism.

    FSDP would only copy and divide the gradients of experts that are whole on one rank. They stay outside FSDP, and the
    kernel that computes their gradients divides them (`experts.grad_divisor`). FSDP still shards replicated experts
    (HSDP) and those of other backends. A `Dispatch` of this library replaces Transformers' wrapper as the experts'
    forward. 4-bit experts stay outside FSDP under every layout.

    If all dense weights are below `SMALL`, they are gathered once per step, several layers per unit, and kept for the
    backward; otherwise GPUs wait for the CPU in small layers. The same holds for float32 routers: Transformers 5.24
    makes them FSDP units of their own in a bfloat16 model, because a unit must have one dtype.
    """
    experts = [module for module in model.modules() if is_experts(module)]
    spread, packed = (layout.ep_size or 1) > 1, any(packed_in(p) is not None for p in model.parameters())
    if not spread and not packed:
        yield
        return
    experts_whole = (
        spread and layout.efsdp_size == 1 and layout.dp_replicate_size == 1 and all(map(uses_fast_experts, experts))
    )
    unsharded = {id(module) for module in experts} if experts_whole else set()
    layers = _layers_to_keep_gathered(model) if spread and _dense_is_small(model, experts) else None
    deferred: dict[str, list[Any]] = {"parts": [], "layers": []}  # inner modules before the layers that contain them

    def fully_shard(module: Any, **options: Any) -> Any:
        if id(module) in unsharded:
            module.set_gradient_divide_factor = partial(setattr, module, "grad_divisor")  # Transformers calls it next
            return module
        if experts_whole or packed:  # collected now, because expert parallelism has just replaced the parameters
            of_experts = {parameter for expert in experts for parameter in expert.parameters()}
            options["ignored_params"] = {p for p in of_experts if experts_whole or packed_in(p) is not None}
        if layers is not None and not is_experts(module):
            options["reshard_after_forward"] = False
            if id(module) in layers:
                deferred[layers[id(module)]].append(module)
                return module
        for units in filter(None, deferred.values() if module is model else ()):  # Transformers shards the model last
            # The first module is a unit alone: its all-gather starts a step, and its reduce-scatter ends it.
            for first in (0, *range(1, len(units), LAYERS_AT_ONCE)):
                stock(units[first : first + LAYERS_AT_ONCE if first else 1], **options)
        return stock(module, **options)

    model.base_model._divides_gradients = experts_whole
    stock = stock_fsdp.fully_shard
    stock_fsdp.fully_shard = fully_shard
    try:
        yield
    finally:
        stock_fsdp.fully_shard = stock
        for module in experts:
            vars(module).pop("set_gradient_divide_factor", None)
    for name, module in model.named_modules():
        if isinstance(dispatch := vars(module).get("dispatch"), Dispatch):
            dispatch.timeout.place, module.forward = name, dispatch
            del module.dispatch


def prepare_for_training(model: Any, reshard_experts: bool) -> None:
    """Give FSDP's collectives the `step_timeout`, and synchronize all ranks before each training forward.
    reshard_experts: whether FSDP frees gathered experts after their forward."""
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False) and isinstance(module, FSDPModule):
            module.set_reshard_after_forward(reshard_experts)
        for unit in fsdp_units(module):
            groups = [getattr(unit.mesh_info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
            limited = step_timeout(f"the weights of {name or type(model).__name__}", *filter(None, groups))
            for call in ("unshard", "post_backward"):  # these start the collectives
                if call not in vars(unit):  # a unit of several modules is met once for each
                    setattr(unit, call, limited(getattr(unit, call)))
    model.base_model.register_forward_pre_hook(partial(_before_training, model, set(model.modules())))


def fsdp_units(module: nn.Module) -> list[Any]:
    """Return the FSDP parameter groups of this module."""
    state = vars(module._get_fsdp_state()) if isinstance(module, FSDPModule) else {}
    return list(filter(None, state.get("_fsdp_param_groups", [state.get("_fsdp_param_group")])))  # torch 2.11: no list


@torch.compiler.disable
def _before_training(model: Any, sharded_modules: set[torch.nn.Module], base: torch.nn.Module, _: Any) -> None:
    """Forward pre-hook of a sharded model in training: synchronize the ranks, and make new adapters equal on all.

    PEFT adds adapters after the model is sharded. FSDP does not manage them, so each rank would initialize and train
    its own. This hook broadcasts rank 0's and averages their gradients. An expert's adapter has a gradient on every
    rank, zero where the expert is not. The mark `_AVERAGED` keeps Transformers' Trainer from averaging a second time.
    """
    if not (base.training and torch.is_grad_enabled()):
        return
    gather_on_hosts("the beginning of a forward")
    world: Any = dist.group.WORLD
    parts = adapter_sources(model)
    for place, module in model.named_modules():
        if module in sharded_modules:
            continue
        experts = getattr(module, "base_layer", None)
        foreign = not isinstance(getattr(experts, "forward", None), Dispatch) or not uses_fast_experts(experts)
        if foreign and getattr(experts, "_is_expert_parallel", False):
            raise ValueError(
                f"{place}: adapters on experts that are spread over ranks (ep_size > 1) need {NAME!r}'s own experts. "
                f"Set that, or ep_size to 1, or adapt attention alone by target_modules."
            )
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or hasattr(parameter, _AVERAGED):
                continue
            if not isinstance(parameter, DTensor):
                with step_timeout(place, world):
                    dist.broadcast(parameter.data, 0)
                if parts.get(parameter, 1) > 1:  # ranks with parts of one batch: their gradients are to be summed
                    parameter.register_hook(partial(torch.mul, other=parts[parameter]))
                average = step_timeout(place, world)(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
                parameter.register_post_accumulate_grad_hook(average)
            elif parameter.device_mesh.size() < world.size():
                raise ValueError(f"{place}: adapters split by tp_size are not averaged over dp_size: set tp_size to 1.")
            setattr(parameter, _AVERAGED, True)


def refuse_undivided(model: Any) -> None:
    """Raise ValueError if this library's experts must divide gradients but another experts backend is set. Any backend
    is accepted while gradients are disabled, as in `generate`."""
    chosen = model.config.get_text_config()._experts_implementation
    if torch.is_grad_enabled() and getattr(model, "_divides_gradients", False) and chosen != NAME:
        raise ValueError(
            f"The experts were laid out for {NAME!r} and cannot be trained by {chosen!r}: their gradients would be too "
            f"large. Load the model with experts_implementation={chosen!r}, or set {NAME!r} again."
        )


def _layers_to_keep_gathered(model: Any) -> dict[int, str]:
    """Return {id of a module: "layers" for a decoder layer, "parts" for a module inside one}. Multi-token prediction
    layers are excluded: they are removed when a checkpoint without them is loaded."""
    mtp, layers = getattr(model, "_mtp", None), list[nn.Module]()
    for name, module in model.named_modules():
        for number, layer in enumerate(module if isinstance(module, nn.ModuleList) else ()):
            if mtp is None or not mtp.owns(f"{name}.{number}."):
                layers.append(layer)
    parts = {id(part): "parts" for layer in layers for part in layer.modules()}
    return parts | {id(layer): "layers" for layer in layers}


def _dense_is_small(model: nn.Module, experts: list[Any]) -> bool:
    """Whether all unsharded parameters outside the experts take less than `SMALL` of the device's memory."""
    of_experts = {parameter for expert in experts for parameter in expert.parameters()}
    dense = sum(p.nbytes for p in model.parameters() if p not in of_experts)
    memory = device_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return dense < SMALL * (memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
