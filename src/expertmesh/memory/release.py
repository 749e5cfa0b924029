"""Gradient release: weights are updated within backward, as soon as their gradients are complete, which then are freed.

So all gradients never stand beside the optimizer's states. Small weights wait until `BYTES` of gradients are there, as
a launch for each norm would be slow; experts go at once, each by four launches of its own.

Autograd runs a post-accumulate hook once per backward and weight, after its last use, tied or not. FSDP2 runs it after
the reduce-scatter, on that stream and on the shard that the optimizer has. There the update runs as well, behind the
collectives and before the event that the next forward waits for.

Clipping needs the norm of all gradients, of which the last comes when most are gone. "exact" measures it by a forward
and backward before; "running" takes the norm r of earlier steps, which after a step with norm n is r (n / r)^(1 -
`MEMORY`). A gradient that only this rank holds is then scaled by max_grad_norm / max(r, m), m: the norm of what this
backward has measured here so far; so a spike is held down where it is seen. Others by max_grad_norm / r, the same
everywhere. The first step has no r, and is exact.
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

BYTES = 2**26  # of gradients that may wait for others, on each stream
MEMORY = 0.9
RUNNING = "running_norm"  # in the optimizer's groups, and so in its checkpoints
T = TypeVar("T")


class GradientRelease:
    """`loss = release.backward(forward)` runs forward and backward and updates the weights of `optimizer` on the way.

    `optimizer.step()` ends the step, with nothing left to update. Learning rates count as they are in `backward`.
    Gradients are clipped to max_grad_norm, or the optimizer's own where that is smaller, as `clipping` says (both None:
    never). `grad_norm`, and after the step `optimizer.grad_norm`, is the norm of all gradients on all ranks before
    clipping, as `expertmesh.clip_grad_norm` returns it, a float32 scalar on the device. The host does not wait for it.

    A loss that is not finite, on any rank, changes no weight. A gradient that is not finite where the loss is changes
    none with "exact"; else the weights whose gradients came before are changed: go back to a checkpoint. So does an
    error within backward. Gradients of other parameters than the optimizer's, and any other backward, stay as ever.

    Raises RuntimeError for gradients that accumulate, ValueError for what updates cannot come before: a closure,
    `GradScaler`, `DistributedDataParallel`. All ranks must call it. `close()` ends it.
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
        self.measuring = False  # whether this forward and backward only measures
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None  # scale and found_inf of all gradients
        self._start: torch.Tensor | None = None  # 0 where the losses of all ranks are finite, else nan
        self._active = False
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._tallies: dict[Any, RunningNorm] = {}  # of each stream
        self._pending: dict[Any, dict[nn.Parameter, int]] = {}
        self._done: set[nn.Parameter] = set()
        self._hooks: dict[nn.Parameter, Any] = {}
        self._before = optimizer.register_step_pre_hook(self._before_step)
        how = "never clipped" if self.max_grad_norm is None else f"clipped to {self.max_grad_norm:g}, {clipping}"
        how += ": a step costs one forward and backward more" * (clipping == "exact")
        backends.logger().info("Weights are updated within backward and gradients freed (%s).", how)

    def backward(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs `loss = forward()` and `loss.backward()`, twice where a norm is to be known: with the same
        random numbers. Returns the detached loss.
        """

        def step() -> torch.Tensor:
            loss = forward()
            self.check(loss)
            loss.backward()
            return loss.detach()

        return self.run(step)

    def run(self, step: Callable[[], T]) -> T:
        """As `backward`, for a function that goes forward and backward by itself, with `check(loss)` in between."""
        if self.grad_norm is not None:
            raise RuntimeError("Released gradients cannot accumulate: call optimizer.step() after each backward.")
        groups = self.optimizer.param_groups
        self._groups = {p: group for group in groups for p in group["params"] if p.requires_grad}
        self._refuse_standing()
        for parameter in self._groups:
            if not self.optimizer.state.get(parameter):
                self.optimizer.prepare(parameter)  # beside the weights, not among activations
        bound, self._known = self.max_grad_norm, None
        running = None if self.clipping == "exact" else groups[0].get(RUNNING)
        if bound is not None and running is None:
            with torch.random.fork_rng({p.device.index for p in self._groups if p.is_cuda}):
                self._pass(step, measuring=True)
            norm = self._norm()
            self._known = clip_factor(norm, bound), 1.0 - torch.isfinite(norm).float()
        result = self._pass(step)
        self.grad_norm = norm = self._norm() if self._known is None else norm
        if bound is not None and self.clipping == "running":
            usable, before = torch.isfinite(norm) & (norm > 0), norm  # the first running norm is that of its step
            if running is not None:
                bound = before = running.to(norm.device, non_blocking=True)
            mean = torch.where(usable, before * (norm / before) ** (1 - MEMORY), bound)
            for group in groups:
                group[RUNNING] = mean
        return result

    def check(self, loss: torch.Tensor) -> None:
        """Between forward and backward: weights change only if this loss is finite on all ranks. No host waits."""
        self._attach()
        if self._known is not None:
            return
        self._start = local_shard(loss.detach()).float().sum() * 0.0
        if dist.is_initialized() and dist.get_world_size() > 1:
            world: Any = dist.group.WORLD
            with step_timeout("the check of the loss", world):
                dist.all_reduce(self._start)

    def changed(self) -> bool:
        """Whether a step whose `grad_norm` is not finite changed weights. Waits for the device."""
        return self._known is None and self._start is not None and math.isfinite(self._start.item())

    def close(self) -> None:
        """Back to gradients that stand until `optimizer.step()` takes them."""
        for hook in (*self._hooks.values(), self._before):
            hook.remove()
        self._hooks.clear()
        self.grad_norm = None

    def _attach(self) -> None:
        """Hooks that weights lack; after the first forward, in which others come that average over ranks."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several and not any(isinstance(p, DTensor) or p._post_accumulate_grad_hooks for p in self._groups):
            raise ValueError(
                "All weights lie whole on each of several ranks, and nobody averages their gradients before they are "
                "released: DistributedDataParallel does it later. Load the model with distributed_setup=, which lays "
                "it out by FSDP2, or do without gradient release."
            )
        this = weakref.WeakMethod(self._accumulated)  # a weight that holds what holds it is never freed

        def accumulated(parameter: torch.Tensor) -> None:
            if (method := this()) is not None:
                method(parameter)

        for parameter in self._groups.keys() - self._hooks.keys():
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(accumulated)

    def _pass(self, step: Callable[[], T], measuring: bool = False) -> T:
        self._start, self._tallies, self._pending, self._done = None, {}, {}, set()
        self._active, self.measuring = True, measuring
        try:
            result = step()
            for place, pending in self._pending.items():
                self._release(place, list(pending))
            return result
        except BaseException:
            for parameter in self._groups:
                parameter.grad = None
            raise
        finally:
            self._active = self.measuring = False

    def _norm(self) -> torch.Tensor:
        assert self._start is not None, "check(loss) comes before backward"
        total = self._start.clone()
        for tally in self._tallies.values():
            total += tally.squares.to(total.device, non_blocking=True)
        return norm_of_all(total)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        """The gradient of a parameter is complete."""
        if not self._active:
            return
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in self._done:
            raise RuntimeError(
                "A gradient went on after it had been released. Checkpoints with use_reentrant=True do that to weights "
                "that several layers share, and so does a backward within a step's backward: use "
                "use_reentrant=False and one loss, or do without gradient release."
            )
        grad = local_shard(parameter.grad)
        place = torch.cuda.current_stream(grad.device) if grad.is_cuda else grad.device
        if grad.nbytes >= BYTES:
            return self._release(place, [parameter])
        pending = self._pending.setdefault(place, {})
        pending[parameter] = grad.nbytes
        if sum(pending.values()) >= BYTES:
            self._release(place, list(self._pending.pop(place)))

    @torch.no_grad()
    def _release(self, place: Any, parameters: list[nn.Parameter]) -> None:
        """Update these weights, on the stream that is current here, and free their gradients."""
        self._done.update(parameters)
        scale, found_inf = self._known or self._judge(place, [p.grad for p in parameters if p.grad is not None])
        if not self.measuring:
            self.optimizer.update([(p, self._groups[p]) for p in parameters], scale, found_inf)
            torch.autograd.graph.increment_version(parameters)  # kernels do not, and a saved weight must be the old one
        for parameter in parameters:
            parameter.grad = None

    def _judge(self, place: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(scale, found_inf) by earlier steps, and by the squares so far, these included."""
        if place not in self._tallies:
            assert self._start is not None, "check(loss) comes before backward"
            self._tallies[place] = RunningNorm(*self._start.to(grads[0].device).repeat(3).unbind())
        tally = self._tallies[place]
        held = local_shards(grads)
        clips = not self.measuring and self.max_grad_norm is not None
        running = self.optimizer.param_groups[0][RUNNING].to(tally.squares.device, non_blocking=True) if clips else None
        own = all(copies == 1 for copies, _ in held)
        for (copies, _), tensors in held.items():
            add_to_norm_(tally, tensors, copies, self.max_grad_norm, running, own)
        return tally.scale if clips else None, tally.found_inf

    def _refuse_standing(self) -> None:
        if any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "Gradients stand that another backward made, beside those that are released: call release.backward("
                "forward) in place of loss.backward(), and optimizer.zero_grad() for those of other work."
            )

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError("optimizer.step() takes no closure with gradient release: pass it to release.backward().")
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise ValueError("GradScaler looks at gradients after backward, where these are gone: train in bfloat16.")
        self._refuse_standing()
        if self.grad_norm is None:
            raise RuntimeError("optimizer.step() without release.backward(forward) before it: nothing was updated.")
        self.optimizer.clip_next(self.grad_norm, math.inf)  # it need not measure what is gone
        self.grad_norm = None
