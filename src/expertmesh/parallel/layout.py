"""Changes to Transformers' FSDP2 layout: FSDP does less where experts are spread over ranks, waits for other ranks have
a limit, and adapters that are added later are the same on all ranks.
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

SMALL = 1 / 30  # of a device's memory
LAYERS_AT_ONCE = 8
_AVERAGED = "_replicated_grad_hook_registered"  # Transformers' name for it


@contextmanager
def expert_parallel_fsdp(model: Any, layout: DistributedConfig) -> Iterator[None]:
    """A block in which Transformers lays the model out; with expert parallelism, FSDP is given less to do.

    Experts that lie whole on one rank need no all-gather and no reduce-scatter: FSDP would only copy their gradients
    and divide them. They stay outside FSDP, and the kernel that computes their gradients divides them
    (`experts.grad_divisor`). Replicated experts (HSDP) and those of other backends stay with FSDP. A `Dispatch` of ours
    becomes the forward of its experts, in the place of Transformers' wrapper. Experts in 4 bits stay outside FSDP under
    every layout: a rank keeps those that expert parallelism gives it, whole.

    If all dense weights together are `SMALL`, they are gathered once per step, several layers at a time, and kept for
    the backward: otherwise small layers wait for the CPU. So are float32 routers, which Transformers 5.24 makes units
    of their own in a bfloat16 model, as FSDP wants one dtype per unit.
    """
    experts = [module for module in model.modules() if is_experts(module)]
    spread, packed = (layout.ep_size or 1) > 1, any(packed_in(p) is not None for p in model.parameters())
    if not spread and not packed:
        yield
        return
    whole = spread and layout.efsdp_size == 1 and layout.dp_replicate_size == 1 and all(map(uses_fast_experts, experts))
    ours = {id(module) for module in experts} if whole else set()
    layers = _layers_to_stay(model) if spread and _dense_is_small(model, experts) else None
    later: dict[str, list[Any]] = {"parts": [], "layers": []}  # parts first: they are in layers

    def fully_shard(module: Any, **options: Any) -> Any:
        if id(module) in ours:
            module.set_gradient_divide_factor = partial(setattr, module, "grad_divisor")  # Transformers calls it next
            return module
        if whole or packed:  # their parameters are made anew when they are spread, which is before this
            of_experts = {parameter for expert in experts for parameter in expert.parameters()}
            options["ignored_params"] = {p for p in of_experts if whole or packed_in(p) is not None}
        if layers is not None and not is_experts(module):
            options["reshard_after_forward"] = False
            if id(module) in layers:
                later[layers[id(module)]].append(module)
                return module
        for units in filter(None, later.values() if module is model else ()):  # the last call
            # the first alone: a step begins when it is gathered, and ends when its gradients are reduced
            for first in (0, *range(1, len(units), LAYERS_AT_ONCE)):
                stock(units[first : first + LAYERS_AT_ONCE if first else 1], **options)
        return stock(module, **options)

    model.base_model._divides_gradients = whole
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
    """Prepare a model that is laid out for training: FSDP's collectives get the `step_timeout`, and all ranks check in
    before each forward. reshard_experts: whether gathered experts are freed after their forward.
    """
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False) and isinstance(module, FSDPModule):
            module.set_reshard_after_forward(reshard_experts)
        for unit in fsdp_units(module):
            groups = [getattr(unit.mesh_info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
            limited = step_timeout(f"the weights of {name or type(model).__name__}", *filter(None, groups))
            for call in ("unshard", "post_backward"):  # where collectives begin, and with backends that raise end
                if call not in vars(unit):  # a unit of several modules comes several times
                    setattr(unit, call, limited(getattr(unit, call)))
    model.base_model.register_forward_pre_hook(partial(_before_training, model, set(model.modules())))


def fsdp_units(module: nn.Module) -> list[Any]:
    """FSDP's groups of parameters that are gathered together, at this module."""
    state = vars(module._get_fsdp_state()) if isinstance(module, FSDPModule) else {}
    return list(filter(None, state.get("_fsdp_param_groups", [state.get("_fsdp_param_group")])))  # torch 2.11 has one


@torch.compiler.disable
def _before_training(model: Any, laid_out: set[torch.nn.Module], base: torch.nn.Module, _: Any) -> None:
    """Before each training forward of a model that is laid out: the ranks meet, and adapters become alike on all.

    PEFT adds these after the layout. FSDP does not know them, so each rank would draw and train its own. Here they
    become rank 0's, and their gradients are averaged; of an expert's adapter every rank has a gradient, which is zero
    where the expert is not. Transformers' Trainer averages, too: the mark `_AVERAGED` on a parameter keeps the second
    of both from it.
    """
    if not (base.training and torch.is_grad_enabled()):
        return
    gather_on_hosts("the beginning of a forward")
    world: Any = dist.group.WORLD
    parts = adapter_sources(model)
    for place, module in model.named_modules():
        if module in laid_out:
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
                if parts.get(parameter, 1) > 1:  # each of so many ranks has a part of a batch, not a batch
                    parameter.register_hook(partial(torch.mul, other=parts[parameter]))
                average = step_timeout(place, world)(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
                parameter.register_post_accumulate_grad_hook(average)
            elif parameter.device_mesh.size() < world.size():
                raise ValueError(f"{place}: nobody averages adapters split by tp_size over dp_size: set tp_size to 1.")
            setattr(parameter, _AVERAGED, True)


def refuse_undivided(model: Any) -> None:
    """Raise ValueError if the layout leaves it to our experts backend to divide gradients, and another one is chosen,
    which does not. Without gradients, as in `generate`, any backend will do.
    """
    chosen = model.config.get_text_config()._experts_implementation
    if torch.is_grad_enabled() and getattr(model, "_divides_gradients", False) and chosen != NAME:
        raise ValueError(
            f"The experts were laid out for {NAME!r} and cannot be trained by {chosen!r}: their gradients would be too "
            f"large. Load the model with experts_implementation={chosen!r}, or set {NAME!r} again."
        )


def _layers_to_stay(model: Any) -> dict[int, str]:
    """{id of a module: "layers" for a layer, "parts" for what is inside one}.

    Layers for multi-token prediction are left out: loading a checkpoint that has none removes them.
    """
    mtp, stay = getattr(model, "_mtp", None), list[nn.Module]()
    for name, module in model.named_modules():
        for number, layer in enumerate(module if isinstance(module, nn.ModuleList) else ()):
            if mtp is None or not mtp.owns(f"{name}.{number}."):
                stay.append(layer)
    parts = {id(part): "parts" for layer in stay for part in layer.modules()}
    return parts | {id(layer): "layers" for layer in stay}


def _dense_is_small(model: nn.Module, experts: list[Any]) -> bool:
    """Whether all parameters outside the experts, whole, take less than `SMALL` of the device's memory."""
    of_experts = {parameter for expert in experts for parameter in expert.parameters()}
    dense = sum(p.nbytes for p in model.parameters() if p not in of_experts)
    memory = device_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return dense < SMALL * (memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
