"""AdamW that walks all parameters in one launch and clips on the way: a step at the speed of memory.

Drop-in for `torch.optim.AdamW`: same arguments, same state, checkpoints move in both directions.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.adamw import Update, adamw_
from expertmesh.parallel.clip import clip_factor, grad_norm, local

#: options by which PyTorch's optimizers choose among their implementations: an optimizer's own, not a checkpoint's
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` by one kernel for all parameters on a GPU, on any mix of meshes; on a CPU PyTorch's fused.

    max_grad_norm: clip to this norm of all gradients, on all ranks, within the step: gradients are measured in one pass
    and scaled as they are used. In memory they stay as they are, as they do with float16's `GradScaler`.

    `grad_norm` is the norm that the last step clipped by, a float32 scalar on the device, or None. All other arguments,
    state and options are PyTorch's. Its ways to compute a step, `fused`, `foreach` and `capturable`, are accepted, and
    mean nothing: the step never waits for the device, and CUDA graphs can capture it (with a learning rate that changes
    as a tensor). Raises ValueError for amsgrad, and for sparse or complex parameters.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf
    grad_norm: torch.Tensor | None = None
    _clip: tuple[torch.Tensor, float] | None = None

    def __init__(self, params: Any, *args: Any, max_grad_norm: float | None = None, **kwargs: Any) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be greater than 0, not {max_grad_norm}; None does not clip.")
        if kwargs.get("differentiable"):
            raise ValueError("This AdamW cannot be differentiated through: use torch.optim.AdamW.")
        self.max_grad_norm = max_grad_norm
        # what PyTorch calls fused keeps the count of steps beside the parameter, as here
        super().__init__(params, *args, **kwargs | {"foreach": None, "fused": True})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"max_grad_norm": self.max_grad_norm}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's."""
        super().add_param_group(param_group)
        _refuse_amsgrad(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, of any `torch.optim.AdamW`; how a step is computed stays this optimizer's choice."""
        for group in state_dict["param_groups"]:
            _refuse_amsgrad(group)
        own = [{key: group[key] for key in IMPLEMENTATION} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)

    def clip_next(self, norm: torch.Tensor, max_norm: float) -> None:
        """The gradients' norm is already known: the next step clips to `max_norm` by it and measures nothing itself.

        norm: a scalar, for which the host does not wait. Where `max_grad_norm` is smaller than max_norm, it holds.
        """
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._clip = norm, min(max_norm, self.max_grad_norm or math.inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; with a closure, after it, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.update(pairs, self._scale(), getattr(self, "found_inf", None))
        return loss

    @torch.no_grad()
    def update(
        self,
        pairs: Iterable[tuple[nn.Parameter, Mapping[str, Any]]],
        scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """The step of some parameters alone, each with its group; scale and found_inf are those of `adamw_`."""
        adamw_([self._update(parameter, group) for parameter, group in pairs], scale, found_inf)

    def prepare(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, made if there is none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif state["step"].device != parameter.device or state["step"].dtype != torch.float32:
            # a checkpoint of PyTorch's foreach AdamW counts on the CPU
            state["step"] = state["step"].to(parameter.device, torch.float32, non_blocking=True)
        return state

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Update:
        grad, state = parameter.grad, self.prepare(parameter)
        assert grad is not None
        if grad.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(
                f"AdamW takes dense gradients of real numbers, not {grad.layout} ones of {parameter.dtype}: "
                f"use torch.optim.SparseAdam or torch.optim.AdamW for such parameters."
            )
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)  # of a split embedding it is whole on every rank
        weight, grad, exp_avg, exp_avg_sq = map(local, (parameter, grad, state["exp_avg"], state["exp_avg_sq"]))
        if grad.shape != weight.shape or exp_avg.shape != weight.shape:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} on this rank has a gradient of {tuple(grad.shape)} and state "
                f"of {tuple(exp_avg.shape)}: lay the model out over ranks before you build the optimizer."
            )
        return Update(weight, grad, exp_avg, exp_avg_sq, state["step"], group)

    def _scale(self) -> torch.Tensor | None:
        """What gradients are multiplied by."""
        grad_scale = getattr(self, "grad_scale", None)
        inverse = None if grad_scale is None else 1.0 / grad_scale.float()
        clip, self._clip = self._clip, None
        if clip is None and self.max_grad_norm is not None:
            norm = grad_norm(p for group in self.param_groups for p in group["params"])
            clip = norm if inverse is None else norm * inverse.to(norm.device), self.max_grad_norm
        if clip is None:
            return inverse
        self.grad_norm, max_norm = clip
        if math.isinf(max_norm):
            return inverse
        factor = clip_factor(self.grad_norm, max_norm)
        return factor if inverse is None else factor * inverse.to(factor.device)


def _refuse_amsgrad(group: Mapping[str, Any]) -> None:
    if group.get("amsgrad"):
        raise ValueError("amsgrad=True is not supported here: leave it out, or use torch.optim.AdamW.")
