"""AdamW that walks all parameters in one launch and clips on the way: a step at the speed of memory.

Drop-in for `torch.optim.AdamW`: same arguments, same state, checkpoints move in both directions.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh import backends
from expertmesh.kernels.adamw import Update, adamw_
from expertmesh.kernels.clip import clip_factor
from expertmesh.memory import states as low_memory
from expertmesh.parallel.clip import grad_norm, local

#: options by which PyTorch's optimizers choose among their implementations: an optimizer's own, not a checkpoint's
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` by one kernel for all parameters on a GPU, on any mix of meshes; on a CPU PyTorch's fused.

    max_grad_norm: clip to this norm of all gradients, on all ranks, within the step: gradients are measured in one pass
    and scaled as they are used. In memory they stay as they are, as they do with float16's `GradScaler`.

    `grad_norm` is the norm that the last step clipped by, a float32 scalar on the device, or None. All other arguments,
    state and options are PyTorch's.

    states: "8bit", "24bit" or "float32" keeps moments and weights as states.py says, for bfloat16 and float32 weights;
    None as PyTorch. `bytes_per_parameter` is what a parameter and its states take. State of any of the four, and
    PyTorch's, can be loaded, and becomes this one's at the next step; with "8bit" and "24bit" PyTorch cannot read it.

    offload: the states of weights of 64 MiB and more lie in pinned memory of the host, where the kernel reads and
    writes them at the speed of PCIe, for a GPU that is alone: sharded weights are refused. `settle()` waits for what it
    writes there, which `state_dict()` does by itself.

    Its ways to compute a step, `fused`, `foreach` and `capturable`, are accepted, and
    mean nothing: the step never waits for the device, and CUDA graphs can capture it (with a learning rate that changes
    as a tensor). Raises ValueError for amsgrad, for sparse or complex parameters, and for states that
    are not for weights of these dtypes.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf
    grad_norm: torch.Tensor | None = None
    _clip: tuple[torch.Tensor, float] | None = None

    def __init__(
        self,
        params: Any,
        *args: Any,
        max_grad_norm: float | None = None,
        states: str | None = None,
        offload: bool = False,
        **kwargs: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be greater than 0, not {max_grad_norm}; None does not clip.")
        if kwargs.get("differentiable"):
            raise ValueError("This AdamW cannot be differentiated through: use torch.optim.AdamW.")
        self.max_grad_norm, self.states, self.offload = max_grad_norm, states, offload
        # what PyTorch calls fused keeps the count of steps beside the parameter, as here
        super().__init__(params, *args, **kwargs | {"foreach": None, "fused": True})
        low_memory.refuse(self._parameters(), states)
        if offload and any(
            isinstance(p, DTensor) or (p.is_cuda and not backends.HAS_TRITON) for p in self._parameters()
        ):
            raise ValueError(
                "offload=True is for a GPU that is alone, by a kernel of Triton's: these weights are sharded, so their "
                "states are shared out already, or Triton is missing. Leave it out."
            )
        kept = "moments in the weights' dtype" if states is None else f'states="{states}"'
        what = f"{type(self).__name__} keeps {kept}: {self.bytes_per_parameter:.2f} bytes a parameter, with its weight."
        on_host = sum(p.nbytes for p in self._parameters() if low_memory.form_of(p, states, offload).host)
        backends.logger().info(what + f" Those of {on_host / 2**30:.1f} GiB of weights are on the host." * offload)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of weights and states by the number of parameters, on this rank; gradients come on top."""
        number = sum(local(parameter).numel() for parameter in self._parameters())
        return low_memory.bytes_kept(self._parameters(), self.states) / max(number, 1)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "states": self.states, "offload": self.offload}
        return super().__getstate__() | own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's."""
        super().add_param_group(param_group)
        _refuse_amsgrad(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, of any `torch.optim.AdamW`; how a step is computed stays this optimizer's choice."""
        for group in state_dict["param_groups"]:
            _refuse_amsgrad(group)
        own = [{key: group[key] for key in IMPLEMENTATION} for group in self.param_groups]
        # PyTorch would put all of it beside the weights
        super().load_state_dict({**state_dict, "state": {}} if self.offload else state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            saved = state_dict["state"].get(number, {})
            if self.states is None and low_memory.is_plain(saved) and not self.offload:
                continue
            state = self.state[parameter]
            for key, value in saved.items():
                if not isinstance(value, torch.Tensor):
                    state[key] = value
                elif self.offload and value.ndim:
                    state[key] = torch.empty_like(value, **self.place(parameter)).copy_(value)
                elif key not in state or value.dtype != state[key].dtype:  # PyTorch has cast it to the weight's dtype
                    state[key] = value.to(parameter.device, copy=True)

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

    def place(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Where tensors of the parameter's state lie, as options of `torch.empty`."""
        return low_memory.place_of(parameter, self._form(parameter))

    def settle(self) -> None:
        """States on the host are what the last step made of them, for code of the host."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    def prepare(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, made if there is none yet."""
        state, form = self.state[parameter], self._form(parameter)
        if not state:
            low_memory.create(parameter, state, form, self._number(parameter))
        elif not low_memory.has_form(state, form, self.states):
            low_memory.convert(parameter, state, form, self._number(parameter))
        if state["step"].device != parameter.device or state["step"].dtype != torch.float32:
            # a checkpoint of PyTorch's foreach AdamW counts on the CPU
            state["step"] = state["step"].to(parameter.device, torch.float32, non_blocking=True)
        return state

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Update:
        grad = parameter.grad
        assert grad is not None
        if grad.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(
                f"AdamW takes dense gradients of real numbers, not {grad.layout} ones of {parameter.dtype}: "
                f"use torch.optim.SparseAdam or torch.optim.AdamW for such parameters."
            )
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)  # of a split embedding it is whole on every rank
        state = self.prepare(parameter)
        kept = low_memory.tensors_of(state, self._form(parameter))
        weight, grad, exp_avg = local(parameter), local(grad), kept["exp_avg"]
        if grad.shape != weight.shape or exp_avg.shape != weight.shape:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} on this rank has a gradient of {tuple(grad.shape)} and state "
                f"of {tuple(exp_avg.shape)}: lay the model out over ranks before you build the optimizer."
            )
        return Update(weight, grad, step=state["step"], options=group, **kept)

    def _form(self, parameter: nn.Parameter) -> low_memory.Form:
        forms = self.__dict__.setdefault("_forms", {})
        if parameter not in forms:
            forms[parameter] = low_memory.form_of(parameter, self.states, self.offload)
        return forms[parameter]

    def _number(self, parameter: nn.Parameter) -> int:
        return next(number for number, other in enumerate(self._parameters()) if other is parameter)

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
