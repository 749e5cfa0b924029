"""Gradient release: weights are updated within backward as soon as their gradients are complete, and these are freed.

Small gradients are collected up to `BYTES`, as a launch for each norm would be slow. Larger ones are released at once.

Autograd calls a post-accumulate hook once per backward and weight, after the last use of the weight, tied or not. FSDP2
calls it after the reduce-scatter, on that stream and with the sharded gradient. The update runs on the same stream,
before the event that the next forward waits for.

Clipping needs the norm of all gradients, but most are freed before the last one is complete. clipping="exact" measures
the norm by an additional forward and backward before. "running" uses a running norm r of earlier steps, which a step
with norm n changes to r (n / r)^(1 - `MEMORY`); the first step has no r and is exact. A gradient that only this rank
holds is scaled by max_grad_norm / max(r, m), where m is the norm measured so far in this backward on this rank; so a
spike is clipped in its own step. Replicated gradients are scaled by max_grad_norm / r, which all ranks share.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh import backends
from expertmesh.kernels.clip import RunningNorm, add_to_norm_, clip_factor
from expertmesh.memory.adamw import AdamW
from expertmesh.memory.muon import Muon
from expertmesh.parallel.clip import local_shard, local_shards, norm_of_all
from expertmesh.timeouts import step_timeout

BYTES = 2**26  # of small gradients that are released in one update, per stream
MEMORY = 0.9  # weight of earlier steps in the running norm
RUNNING = "running_norm"  # key in the optimizer's parameter groups, and so in its checkpoints
T = TypeVar("T")


class GradientRelease:
    """`loss = release.backward(forward)` runs forward and backward, and updates the weights of `optimizer` meanwhile.

    `optimizer.step()` must end each step; it updates nothing more. Learning rates are read in `backward`. Gradients are
    clipped to the smaller of max_grad_norm and the optimizer's own (both None: never), as `clipping` says. `grad_norm`,
    and after the step `optimizer.grad_norm`, is the norm of all gradients on all ranks before clipping, a float32
    scalar on the device. The host does not wait for it.

    If the loss is not finite on any rank, no weight changes. If only a gradient is not finite, "exact" changes no
    weight, but "running" has changed those whose gradients came before: resume from a checkpoint. The same holds after
    an error within backward. Gradients of other parameters, and other backward calls, are not affected.

    Raises RuntimeError for gradient accumulation, and ValueError for a closure, `GradScaler` and
    `DistributedDataParallel`. All ranks must call it. `close()` removes the hooks.
    """

    def __init__(
        self, optimizer: AdamW, clipping: Literal["running", "exact"] = "running", max_grad_norm: float | None = None
    ) -> None:
        if not isinstance(optimizer, AdamW) or isinstance(optimizer, Muon):
            raise ValueError(
                f"Gradients are released to an expertmesh.AdamW, not to {type(optimizer).__name__}: a trainer has ours "
                f"as optim='adamw_torch_fused'."
            )
        if clipping not in ("running", "exact"):
            raise ValueError(f"clipping is 'running' or 'exact', not {clipping!r}.")
        bounds = (bound for bound in (max_grad_norm, optimizer.max_grad_norm) if bound is not None)
        self.max_grad_norm = min(bounds, default=None)
        if clipping == "exact" and self.max_grad_norm is None:
            raise ValueError(
                "clipping='exact' measures each step, to clip to nothing: set max_grad_norm, or 'running'."
            )
        self.optimizer, self.clipping = optimizer, clipping
        self.grad_norm: torch.Tensor | None = None  # between `backward` and `optimizer.step()`
        self.measuring = False  # whether this forward and backward only measures the norm
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None  # scale and found_inf by the exact norm
        self._loss_check: torch.Tensor | None = None  # 0 where the losses of all ranks are finite, else nan
        self._in_backward = False
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._norms: dict[Any, RunningNorm] = {}  # per stream
        self._pending: dict[Any, dict[nn.Parameter, int]] = {}
        self._released: set[nn.Parameter] = set()
        self._hooks: dict[nn.Parameter, Any] = {}
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        how = "never clipped" if self.max_grad_norm is None else f"clipped to {self.max_grad_norm:g}, {clipping}"
        how += ": a step costs one forward and backward more" * (clipping == "exact")
        backends.logger().info("Weights are updated within backward and gradients freed (%s).", how)

    def backward(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `loss = forward()` and `loss.backward()`, twice with the same random numbers if the exact norm is needed.
        Return the detached loss.
        """

        def step() -> torch.Tensor:
            loss = forward()
            self.check(loss)
            loss.backward()
            return loss.detach()

        return self.run(step)

    def run(self, step: Callable[[], T]) -> T:
        """As `backward`, for a function that itself runs forward, `check(loss)` and backward. Return its result."""
        if self.grad_norm is not None:
            raise RuntimeError("Released gradients cannot accumulate: call optimizer.step() after each backward.")
        groups = self.optimizer.param_groups
        self._groups = {p: group for group in groups for p in group["params"] if p.requires_grad}
        self._refuse_other_gradients()
        for parameter in self._groups:
            if not self.optimizer.state.get(parameter):
                self.optimizer.prepare(parameter)  # allocate it now, not between activations
        bound, self._exact = self.max_grad_norm, None
        running = None if self.clipping == "exact" else groups[0].get(RUNNING)
        if bound is not None and running is None:
            with torch.random.fork_rng({p.device.index for p in self._groups if p.is_cuda}):
                self._run_once(step, measuring=True)
            norm = self._norm()
            self._exact = clip_factor(norm, bound), 1.0 - torch.isfinite(norm).float()
        result = self._run_once(step)
        self.grad_norm = norm = self._norm() if self._exact is None else norm
        if bound is not None and self.clipping == "running":
            usable, before = torch.isfinite(norm) & (norm > 0), norm  # the first running norm is that of its step
            if running is not None:
                bound = before = running.to(norm.device, non_blocking=True)
            mean = torch.where(usable, before * (norm / before) ** (1 - MEMORY), bound)
            for group in groups:
                group[RUNNING] = mean
        return result

    def check(self, loss: torch.Tensor) -> None:
        """Call it between forward and backward: weights change only if this loss is finite on all ranks."""
        self._attach()
        if self._exact is not None:
            return
        self._loss_check = local_shard(loss.detach()).float().sum() * 0.0
        if dist.is_initialized() and dist.get_world_size() > 1:
            world: Any = dist.group.WORLD
            with step_timeout("the check of the loss", world):
                dist.all_reduce(self._loss_check)

    def changed(self) -> bool:
        """Whether a step whose `grad_norm` is not finite changed weights. It waits for the device."""
        return self._exact is None and self._loss_check is not None and math.isfinite(self._loss_check.item())

    def close(self) -> None:
        """Remove all hooks: from then on gradients remain until `optimizer.step()`."""
        for hook in (*self._hooks.values(), self._step_hook):
            hook.remove()
        self._hooks.clear()
        self.grad_norm = None

    def _attach(self) -> None:
        """Register missing hooks. This must come after the forward, which may register hooks that average gradients."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several and not any(isinstance(p, DTensor) or p._post_accumulate_grad_hooks for p in self._groups):
            raise ValueError(
                "All weights are replicated on several ranks, and their gradients are not averaged before they are "
                "released: DistributedDataParallel does it later. Load the model with distributed_setup=, which "
                "shards it by FSDP2, or do without gradient release."
            )
        this = weakref.WeakMethod(self._accumulated)  # a reference cycle through a hook is never freed

        def accumulated(parameter: torch.Tensor) -> None:
            if (method := this()) is not None:
                method(parameter)

        for parameter in self._groups.keys() - self._hooks.keys():
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(accumulated)

    def _run_once(self, step: Callable[[], T], measuring: bool = False) -> T:
        self._loss_check, self._norms, self._pending, self._released = None, {}, {}, set()
        self._in_backward, self.measuring = True, measuring
        try:
            result = step()
            for stream, pending in self._pending.items():
                self._release(stream, list(pending))
            return result
        except BaseException:
            for parameter in self._groups:
                parameter.grad = None
            raise
        finally:
            self._in_backward = self.measuring = False

    def _norm(self) -> torch.Tensor:
        assert self._loss_check is not None, "check(loss) comes before backward"
        total = self._loss_check.clone()
        for norm in self._norms.values():
            total += norm.squares.to(total.device, non_blocking=True)
        return norm_of_all(total)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        """Post-accumulate hook: the gradient of a parameter is complete."""
        if not self._in_backward:
            return
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in self._released:
            raise RuntimeError(
                "A gradient was accumulated after it had been released. That happens to weights that several layers "
                "share with checkpoints of use_reentrant=True, and in a backward within a step's backward: use "
                "use_reentrant=False and one loss, or do without gradient release."
            )
        grad = local_shard(parameter.grad)
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else grad.device
        if grad.nbytes >= BYTES:
            return self._release(stream, [parameter])
        pending = self._pending.setdefault(stream, {})
        pending[parameter] = grad.nbytes
        if sum(pending.values()) >= BYTES:
            self._release(stream, list(self._pending.pop(stream)))

    @torch.no_grad()
    def _release(self, stream: Any, parameters: list[nn.Parameter]) -> None:
        """Update these weights on the current stream, and free their gradients."""
        self._released.update(parameters)
        scale, found_inf = self._exact or self._clip_scale(stream, [p.grad for p in parameters if p.grad is not None])
        if not self.measuring:
            self.optimizer.update([(p, self._groups[p]) for p in parameters], scale, found_inf)
            torch.autograd.graph.increment_version(parameters)  # as kernels do not: autograd checks saved weights
        for parameter in parameters:
            parameter.grad = None

    def _clip_scale(self, stream: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return (scale, found_inf) by the running norm and by the squares of this backward, including these."""
        if stream not in self._norms:
            assert self._loss_check is not None, "check(loss) comes before backward"
            self._norms[stream] = RunningNorm(*self._loss_check.to(grads[0].device).repeat(3).unbind())
        norm = self._norms[stream]
        shards = local_shards(grads)
        clips = not self.measuring and self.max_grad_norm is not None
        running = self.optimizer.param_groups[0][RUNNING].to(norm.squares.device, non_blocking=True) if clips else None
        unreplicated = all(copies == 1 for copies, _ in shards)
        for (copies, _), tensors in shards.items():
            add_to_norm_(norm, tensors, copies, self.max_grad_norm, running, unreplicated)
        return norm.scale if clips else None, norm.found_inf

    def _refuse_other_gradients(self) -> None:
        if any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "There are gradients of another backward, which would not be released: call release.backward(forward) "
                "in place of loss.backward(), and optimizer.zero_grad() for those of other work."
            )

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError("optimizer.step() takes no closure with gradient release: pass it to release.backward().")
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise ValueError("GradScaler needs gradients after backward, where these are freed: train in bfloat16.")
        self._refuse_other_gradients()
        if self.grad_norm is None:
            raise RuntimeError("optimizer.step() without release.backward(forward) before it: nothing was updated.")
        self.optimizer.clip_next(self.grad_norm, math.inf)  # the gradients are freed and cannot be measured
        self.grad_norm = None
