"""PEFT's adapters on routed experts, computed as low-rank products instead of by adding full weights.

    LoraConfig(r=16, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

PEFT wraps an experts module in one `ParamWrapper` per target. In every call it adds B_e · A_e of each expert e to the
full weight. In a fused model the wrapper becomes a `FastParamWrapper` at the next forward: it stores the factors in the
experts' `low_rank` during the call, and experts.py computes with them. Everything else is PEFT's code.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from expertmesh.backends import logger, warn_once
from expertmesh.moe.experts import Dispatch, is_experts, uses_fast_experts
from expertmesh.twins import Fast, is_traced, twin

WEIGHTS = {"gate_up_proj", "up_proj", "down_proj"}


class FastParamWrapper(Fast):
    """Must equal PEFT's `ParamWrapper`, which enters `_activate_lora` around the call of the wrapped module."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        if not names or not self._is_native():
            with super()._activate_lora(active_adapters):
                yield
            return
        experts = self.get_base_layer()
        factors = vars(experts).setdefault("low_rank", {})
        factors[self.parameter_name] = self._factors(names, experts)
        try:
            yield
        finally:
            del factors[self.parameter_name]

    def _is_native(self) -> bool:
        experts = self.get_base_layer()
        if not uses_fast_experts(experts) or is_traced():
            return False
        dtype = self.get_param().dtype
        if self.num_experts == 1 or dtype not in (torch.bfloat16, torch.float16, torch.float32):
            warn_once(
                f"PEFT adds the adapters of {self.parameter_name} ({self.num_experts} experts, {dtype}) to the full "
                f"weight in every step: expertmesh has no low-rank kernel for this number of experts or dtype."
            )
            return False
        return True

    def _factors(self, names: list[str], experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [E, R, in] and scaled B [E, R, out] of this rank's experts, adapters concatenated along R."""
        dispatch, local, dtype = vars(experts).get("forward"), slice(None), self.get_param().dtype
        if isinstance(dispatch, Dispatch):
            first = dispatch.rank * dispatch.num_local_experts
            local = slice(first, first + dispatch.num_local_experts)
        shared = self.num_experts, local, dtype
        factors_a = [factor_of(self.lora_A[name].weight, False, 1.0, *shared) for name in names]
        factors_b = [factor_of(self.lora_B[name].weight, True, self.scaling[name], *shared) for name in names]
        if len(names) == 1:
            return factors_a[0], factors_b[0]
        return torch.cat(factors_a, 1), torch.cat(factors_b, 1)


class _Factor(torch.autograd.Function):
    """Return scale · A [E·r, in] or B [out, r·E] of PEFT as [E, R, in or out] of the `local` experts. R is r rounded up
    to a multiple of 16 with rows of zeros. Forward and backward take one pass over memory each.
    """

    @staticmethod
    def forward(ctx: Any, weight, is_b: bool, scale: float, num_experts: int, local: slice, dtype: torch.dtype):
        ctx.args, ctx.like, ctx.scale = (is_b, num_experts, local), (weight.shape, weight.dtype), scale
        factor = _by_expert(weight, *ctx.args)
        num_local, rank, width = factor.shape
        padding = -rank % 16
        out = factor.new_empty(num_local, rank + padding, width, dtype=dtype)
        torch.mul(factor, scale, out=out[:, :rank])  # one pass and one rounding
        out[:, rank:] = 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfactor):
        shape, dtype = ctx.like
        owns_all = ctx.args[2] == slice(None)  # otherwise gradients of other ranks' experts are zero here
        dweight = (dfactor.new_empty if owns_all else dfactor.new_zeros)(shape, dtype=dtype)
        local = _by_expert(dweight, *ctx.args)
        torch.mul(dfactor[:, : local.shape[1]], ctx.scale, out=local)
        return dweight, *[None] * 5


factor_of: Any = _Factor.apply


def _by_expert(weight: torch.Tensor, is_b: bool, num_experts: int, local: slice) -> torch.Tensor:
    """Return a view [E, r, in or out]. PEFT stores A grouped by expert, and B with the experts interleaved."""
    if is_b:
        return weight.view(weight.shape[0], -1, num_experts).permute(2, 1, 0)[local]
    return weight.view(num_experts, -1, weight.shape[1])[local]


def find_modules(model: nn.Module, fits: Callable[[Any], bool]) -> list[tuple[nn.Module, str]]:
    """Return (parent, name) of the modules for which `fits` is true. Adapters may later wrap the module there."""
    children = ((parent, *child) for parent in model.modules() for child in parent.named_children())
    return [(parent, name) for parent, name, child in children if fits(child)]


def fuse_adapted_experts(locations: Iterable[tuple[nn.Module, str]]) -> None:
    """Convert the PEFT wrappers now found at these (parent, name) locations of experts to `FastParamWrapper`."""
    for parent, name in locations:
        wrapper: Any = parent._modules.get(name)
        while is_wrapper(wrapper) and not isinstance(wrapper, Fast):
            if wrapper.parameter_name in WEIGHTS:
                stock: Any = type(wrapper)
                wrapper.__class__ = twin(stock, FastParamWrapper)
            wrapper = wrapper.base_layer


def adapter_sources(model: nn.Module) -> dict[nn.Parameter, int]:
    """Map each adapter parameter on dispatched experts to the number of tensor-parallel ranks that split its batch."""
    sources: dict[nn.Parameter, int] = {}
    for wrapper in filter(is_wrapper, model.modules()):
        dispatch = vars(wrapper.get_base_layer()).get("forward")  # type: ignore[operator]
        if isinstance(dispatch, Dispatch):
            sources |= dict.fromkeys(wrapper.parameters(), dispatch.tp_mesh.size())
    return sources


def is_wrapper(module: Any) -> bool:
    """Return whether this is PEFT's wrapper around a module that has adapters on a parameter."""
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "parameter_name")


#: options of a LoraConfig that PEFT rejects for `target_parameters`
_REFUSED_OPTIONS = "lora_dropout lora_bias use_dora velora_config kasa_config layers_to_transform".split()


def patch_peft_experts() -> None:
    """Monkey-patch PEFT, if it is imported, so that `_complete` extends the LoraConfig of a fused model."""
    lora: Any = getattr(sys.modules.get("peft.tuners.lora.model"), "LoraModel", None)
    if lora is None or lora._check_new_adapter_config.__module__ == __name__:
        return
    stock = lora._check_new_adapter_config

    def check(self: Any, config: Any) -> None:
        if config.peft_type == "LORA" and getattr(self.model, "in_fused_model", False):
            _complete(config, self.model)
        stock(self, config)

    lora._check_new_adapter_config = check


def _complete(config: Any, model: nn.Module) -> None:
    """Make all-linear include the routed experts of any family, and put no adapters on routers that the user froze."""
    targets, trained = set(config.target_parameters or ()), [n for n, p in model.named_parameters() if p.requires_grad]
    if trained and not any(re.search(_KINDS["routers"], n) for n in trained) and not config.inference_mode:
        targets.discard("gate.weight")  # the user froze the routers; PEFT would have frozen everything
    layout = getattr(getattr(model, "config", None), "distributed_config", None)
    split = (getattr(layout, "tp_size", None) or 1) > 1 and (getattr(layout, "ep_size", None) or 1) == 1
    if str(config.target_modules).lower() == "all-linear":
        refused = [name for name in _REFUSED_OPTIONS if getattr(config, name, None)] + ["tp_size"] * split
        refused += ["init_lora_weights"] * (config.init_lora_weights not in (True, False, "gaussian"))
        if refused:
            warn_once(f"all-linear leaves the routed experts as they are: adapters on them take no {refused[0]}.")
        else:
            targets |= _weights_of_experts(model)
    if split and any(target.rpartition(".")[2] in WEIGHTS for target in targets):
        raise ValueError(
            f"PEFT cannot put adapters on experts that tensor parallelism splits ({', '.join(sorted(targets))}): set "
            f"ep_size to tp_size or a multiple, so that a rank holds whole experts, or tp_size to 1."
        )
    config.target_parameters = targets or config.target_parameters


def _weights_of_experts(model: nn.Module) -> set[str]:
    """Return the names of the experts' weights for `target_parameters`."""
    return {f"experts.{n}" for m in model.modules() if is_experts(m) for n in WEIGHTS & m._parameters.keys()}


#: kind of parameter -> regular expression for its name; the first match counts
_KINDS = {
    "routed experts": r"\bexperts\.",
    "shared experts": r"shared_(expert|mlp)",
    "routers": r"\.(gate|router)\.",
    "embeddings and head": r"embed|lm_head",
    "attention": r"attn|attention|\.(q|k|v|o|q_a|q_b|kv_a|kv_b)_proj",
    "other layers": r"",
}


def log_trainable_parameters(model: nn.Module) -> None:
    """Log the number of trainable parameters of each kind if the model has PEFT adapters."""
    if not any(hasattr(module, "base_layer") for module in model.modules()):
        return
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[next(kind for kind, part in _KINDS.items() if re.search(part, name))] += parameter.numel()
    counts = ", ".join(f"{kind} {trained[kind]:,}" for kind in _KINDS if trained[kind] or kind == "routers")
    line = f"expertmesh: {type(model).__name__} trains {trained.total():,} parameters: {counts}."
    if (weights := _weights_of_experts(model)) and not trained["routed experts"]:
        line += f" The routed experts stay as they are; LoraConfig(target_parameters={sorted(weights)}) adapts them."
    logger().info(line)
