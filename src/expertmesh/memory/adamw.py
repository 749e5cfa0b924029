"""AdamW that updates all parameters and clips their gradients in one kernel launch, limited by memory bandwidth."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh import backends
from expertmesh.kernels.adamw import Scalar, Update, adamw_
from expertmesh.kernels.clip import clip_factor
from expertmesh.memory import states as low_memory
from expertmesh.parallel.clip import grad_norm, local_shard

#: options of parameter groups that are not restored from a checkpoint: PyTorch's implementation flags, and Muon's mark
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable", "muon")
Pairs = Iterable[tuple[nn.Parameter, Mapping[str, Any]]]  # (parameter, its parameter group)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with one kernel for all parameters on a GPU, which may be on different meshes. On a CPU it
    runs PyTorch's fused implementation. Arguments and state are PyTorch's, so either can load the other's checkpoints.

    max_grad_norm: clip to this norm of all gradients of all ranks within the step. The kernel scales gradients as it
    reads them, so they do not change in memory. `grad_norm` is the norm by which the last step clipped, a float32
    scalar on the device, or None.

    states: "8bit", "24bit" or "float32", the formats of moments and weights in states.py, for bfloat16 and float32
    weights; None is PyTorch's. State in any of these formats can be loaded; the next step converts it. PyTorch cannot
    load "8bit" and "24bit" state.

    offload: keep the state of weights of at least 64 MiB in pinned host memory. The kernel reads and writes it there at
    the speed of PCIe. Only for a single GPU: sharded weights are refused.

    `fused`, `foreach` and `capturable` are ignored: the step never synchronizes with the device, and CUDA graphs can
    capture it (a learning rate that changes must be a tensor). Raises ValueError for states that do not support the
    weights' dtypes, and in the step for amsgrad and for sparse or complex gradients.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf
    grad_norm: torch.Tensor | None = None
    _clip: tuple[torch.Tensor, float] | None = None

    def __init__(
        self, params: Any, *args: Any, max_grad_norm: float | None = None, states: str | None = None,
        offload: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be greater than 0, not {max_grad_norm}; None does not clip.")
        self.max_grad_norm, self.states, self.offload = max_grad_norm, states, offload
        # with fused=True, PyTorch keeps the step count on the parameter's device, as this class does
        super().__init__(params, *args, **kwargs | {"foreach": None, "fused": True})
        low_memory.refuse(self._all_parameters(), states)
        if offload and any(isinstance(parameter, DTensor) for parameter in self._all_parameters()):
            raise ValueError("offload=True is for a GPU that is alone, and these weights are sharded: leave it out.")
        kind = "moments in the weights' dtype" if states is None else f'states="{states}"'
        what = f"{type(self).__name__} keeps {kind}: {self.bytes_per_parameter:.2f} bytes a parameter, with its weight."
        on_host = sum(p.nbytes for p in self._all_parameters() if "pin_memory" in self.form(p).place)
        backends.logger().info(what + f" Those of {on_host / 2**30:.1f} GiB of weights are on the host." * offload)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of weights and optimizer state per parameter, on this rank, without gradients."""
        number = sum(local_shard(parameter).numel() for parameter in self._all_parameters())
        return sum(low_memory.bytes_kept(p, self.form(p)) for p in self._all_parameters()) / max(number, 1)

    def _all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        options = {"max_grad_norm": self.max_grad_norm, "states": self.states, "offload": self.offload}
        return super().__getstate__() | options

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any `torch.optim.AdamW`. This optimizer keeps its own implementation flags."""
        flags = [{key: group[key] for key in IMPLEMENTATION if key in group} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})  # PyTorch would cast the state to the weights' dtype
        for group, options in zip(self.param_groups, flags, strict=True):
            group.update(options)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._all_parameters(), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key == "step":  # PyTorch's foreach AdamW keeps it on the CPU
                    value = torch.as_tensor(value, dtype=torch.float32, device=parameter.device)
                elif isinstance(value, torch.Tensor):
                    place = self.form(parameter).place
                    on_host = "pin_memory" in place
                    value = torch.empty_like(value, **place).copy_(value) if on_host else value.to(**place)
                self.state[parameter][key] = value

    def clip_next(self, norm: torch.Tensor, max_norm: float) -> None:
        """Make the next step clip to `max_norm` by this norm of the gradients instead of measuring it. norm: a scalar,
        which is not copied to the host. The smaller of max_norm and `max_grad_norm` applies."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._clip = norm, min(max_norm, self.max_grad_norm or math.inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.update(pairs, self._scale(), getattr(self, "found_inf", None))
        return loss

    @torch.no_grad()
    def update(self, pairs: Pairs, scale: Scalar = None, found_inf: Scalar = None) -> None:
        """Update only these parameters. scale and found_inf are those of `adamw_`."""
        adamw_([self._update(parameter, group) for parameter, group in pairs], scale, found_inf)

    def settle(self) -> None:
        """Wait for the last step if state is offloaded, so that the CPU can read it."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    def prepare(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of a parameter, created or converted to this optimizer's format if needed."""
        state, form = self.state[parameter], self.form(parameter)
        if not state:
            low_memory.create(parameter, state, form)
        elif not low_memory.has_form(parameter, state, form):
            low_memory.convert(parameter, state, form)
        return state

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Update:
        grad, state, form = self._grad(parameter, group), self.prepare(parameter), self.form(parameter)
        pieces = {key: local_shard(state[key]) for key in form.tensors}
        avg, square = (pieces[f"{key}_8bit" if form.size else key] for key in form.moments)
        scales = (pieces["exp_avg_scale"], pieces["exp_avg_sq_scale"]) if form.size else None
        weight, master = local_shard(parameter), pieces.get(low_memory.MASTER, pieces.get(low_memory.REST))
        if grad.shape != weight.shape or avg.shape != weight.shape:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} on this rank has a gradient of {tuple(grad.shape)} and state "
                f"of {tuple(avg.shape)}: lay the model out over ranks before you build the optimizer."
            )
        stream = state.get(low_memory.STREAM, 0)
        return Update(weight, grad, avg, square, state["step"], group, master, scales, stream, form.first)

    def _grad(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.Tensor:
        grad = parameter.grad
        assert grad is not None
        if group["amsgrad"] or grad.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(
                f"AdamW takes dense gradients of real numbers without amsgrad, not {grad.layout} ones of "
                f"{parameter.dtype} with amsgrad={group['amsgrad']}: use torch.optim.SparseAdam or torch.optim.AdamW."
            )
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)  # a split embedding's gradient is replicated
        return local_shard(grad)

    def form(self, parameter: nn.Parameter) -> low_memory.Form:
        """Return the format of a parameter's state, cached per device and dtype."""
        forms, key = self.__dict__.setdefault("_forms", {}), (parameter, parameter.device, parameter.dtype)
        if key not in forms:
            pairs = [(p, group.get("muon")) for group in self.param_groups for p in group["params"]]
            for number, (p, muon) in enumerate(pairs):
                moments = (low_memory.MOMENTUM,) if muon else low_memory.MOMENTS
                form = low_memory.form_of(p, self.states, self.offload, number, moments)
                forms[p, p.device, p.dtype] = form
        return forms[key]

    def _scale(self) -> torch.Tensor | None:
        grad_scale = getattr(self, "grad_scale", None)
        scale = None if grad_scale is None else 1.0 / grad_scale.float()
        clip, self._clip = self._clip, None
        if clip is None and self.max_grad_norm is not None:
            norm = grad_norm(self._all_parameters())
            clip = norm if scale is None else norm * scale.to(norm.device), self.max_grad_norm
        if clip is not None:
            self.grad_norm, max_norm = clip
            if not math.isinf(max_norm):
                factor = clip_factor(self.grad_norm, max_norm)
                scale = factor if scale is None else factor * scale.to(factor.device)
        return scale
