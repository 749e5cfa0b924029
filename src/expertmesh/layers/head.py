"""Language-model head that does not materialize [tokens, vocabulary] logits in training.

In a call with `defers` (records.py) the head returns `DeferredLogits`, whose values are computed only when an operation
reads them. `causal_lm_loss`, which replaces Transformers' `ForCausalLMLoss`, computes the loss from the hidden states.
In the backward it returns a `DeferredGradient` for the logits, which carries the gradients of the head's inputs. The
autograd graph is the same as in Transformers, so hooks on the logits, their gradients, edits and copies all work.
"""

import copy
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss

from expertmesh import backends
from expertmesh.kernels.linear_cross_entropy import Statistics, linear_cross_entropy, scaled
from expertmesh.parallel.layout import fsdp_units
from expertmesh.records import current
from expertmesh.twins import Fast, is_traced, is_unmodified

MOST_LABELLED = 0.9  # above this fraction of labelled tokens, selecting them costs more than it saves
aten = torch.ops.aten


class FastHead(Fast):
    """Twin of the `nn.Linear` that computes the logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        call = None if is_traced() else current.get()
        if call is None or not call.defers or not type(self.weight.data) is type(input.data) is torch.Tensor:
            return super().forward(input)
        unit = self if isinstance(self, FSDPModule) else call.model
        if unit is not self and not is_unmodified(self):
            # for example DeepSpeed's ZeRO-3, which frees the weight after the head's forward
            backends.warn_once(
                f"The head of this {type(unit).__name__} has hooks or a replaced forward, so it computes all logits."
            )
            return super().forward(input)
        _heads().add(self)
        sharded = isinstance(unit, FSDPModule)
        # whether FSDP frees the weight after the forward
        frees = sharded and any(group.post_forward_mesh_info is not None for group in fsdp_units(unit))
        return deferred_logits(input, self.weight, self.bias, sharded, frees)


@functools.cache
def _heads() -> weakref.WeakSet[nn.Module]:
    """Return the heads that deferred logits. An optimizer hook increments the versions of their weights, because many
    optimizers, such as PyTorch's fused ones, change weights without doing so."""
    heads = weakref.WeakSet[nn.Module]()

    def increment(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = {id(parameter): parameter for head in heads for parameter in head.parameters()}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        torch.autograd.graph.increment_version([weights[key] for key in weights.keys() & stepped])

    register_optimizer_step_post_hook(increment)
    return heads


_UNAVAILABLE = (
    "These logits were not computed in the forward, and now they cannot be: {}. Read outputs.logits earlier "
    "(outputs.logits.detach().clone() keeps them), or load the model with fused={{'linear_cross_entropy': False}}."
)


def _versions(*tensors: torch.Tensor | None) -> list[int]:
    """Return autograd's version counters, which count changes in place."""
    return [0 if x is None or x.is_inference() else x._version for x in tensors]


class _Deferred(torch.Tensor):
    """Tensor that is computed once, when first used: logits [..., V] = steps(hidden [..., H] @ weightᵀ + bias), or
    another function of these (`_compute`). The `steps` together multiply by `scale`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    made_of: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # detached hidden, weight, bias
    versions: list[int]  # of `made_of` when the head was called
    call: dict[str, bool]  # identifies this call of the head; "gone": FSDP has freed the weight of this call
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    scale: float
    _computed: list[torch.Tensor]  # empty, or the values; shared by aliases
    _compute: Callable[[], torch.Tensor]
    _scaled: Callable[[float, torch.dtype], dict[str, Any] | None]  # new attributes when scaled; None: not deferred

    @classmethod
    def _create(cls, shape: Any, dtype: torch.dtype, **attributes: Any) -> Any:
        self = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=attributes["made_of"][0].device)
        self.__dict__.update({"_computed": []} | attributes)
        return self

    def check_weight(self) -> None:
        """Raise RuntimeError if FSDP has freed the head's weight or if it has changed since the forward."""
        if self.call["gone"]:
            raise RuntimeError(_UNAVAILABLE.format("FSDP has freed the head's weight"))
        if _versions(*self.made_of) != self.versions:
            raise RuntimeError(_UNAVAILABLE.format("the head's weight has changed (optimizer.step()?)"))

    def _logits(self) -> torch.Tensor:
        self.check_weight()
        logits = F.linear(*self.made_of)
        for step in self.steps:
            logits = step(logits)
        return logits

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Return the values as a plain, detached tensor."""
        if not self._computed:
            self._computed.append(self._compute())
        return self._computed[0]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if isinstance(first, _Deferred):
            if func in (aten.detach.default, aten.alias.default):
                return first._create(first.shape, first.dtype, **first.__dict__)
            factor, dtype = (None, first.dtype) if first._computed else _scaling(func, first, args, kwargs)
            changed = None if factor is None else first._scaled(factor, dtype)
            if changed is not None:
                return first._create(first.shape, dtype, **first.__dict__ | changed | {"_computed": []})
        plain_args, plain_kwargs = tree_map_only(_Deferred, _Deferred.values, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if not func._schema.is_mutable:
            return out
        deferred = {id(x.values()): x for x in tree_leaves((args, kwargs)) if isinstance(x, _Deferred)}
        return tree_map(lambda x: deferred.get(id(x), x), out)

    def _plain(self) -> torch.Tensor:
        return self.values().detach().requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._plain(), memo) if self.is_leaf else super().__deepcopy__(memo)  # raises


# methods that bypass PyTorch's dispatcher
for _name in "numpy tolist data_ptr untyped_storage storage __dlpack__ __reduce_ex__ __repr__".split():
    setattr(_Deferred, _name, lambda self, *args, _name=_name, **kwargs: getattr(self._plain(), _name)(*args, **kwargs))


class DeferredLogits(_Deferred):
    """The head's output. Conversion to a wider dtype and multiplication by a number (Granite, Cohere) stay deferred.
    weight, bias: the head's, with which MTP computes further logits. statistics: set by a loss with `counts`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    needs_grad: list[bool]  # of hidden states, weight and bias
    statistics: Statistics | None = None

    _compute = _Deferred._logits

    def _scaled(self, factor: float, dtype: torch.dtype) -> dict[str, Any] | None:
        if torch.promote_types(self.dtype, dtype) != dtype:
            return None
        return {"steps": (*self.steps, lambda logits: logits.to(dtype) * factor), "scale": self.scale * factor}


class DeferredGradient(_Deferred):
    """Gradient of deferred logits: factor · (softmax(logits) - onehot(targets)), 0 for rows without a target.
    parts: as in `Loss`, but the gradient of hidden states covers only the rows with indices `rows` (None: all)."""

    parts: tuple[Any, ...]
    factor: torch.Tensor  # [1], float32
    targets: torch.Tensor
    rows: torch.Tensor | None
    ignore_index: int

    def _compute(self) -> torch.Tensor:
        logits, ignored = self._logits().flatten(0, -2), (self.targets == self.ignore_index)[:, None]
        grad = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        targets = self.targets[:, None].masked_fill(ignored, 0)
        grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
        return grad.mul_(self.factor).masked_fill_(ignored, 0.0).to(self.dtype).view(self.shape)

    def _scaled(self, factor: float, dtype: torch.dtype) -> dict[str, Any]:
        return {"factor": self.factor * factor}

    def gradients(self, call: dict[str, bool], needed: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...] | None:
        """Return the gradients of hidden, weight and bias of the head's `call`, or None if they are not available."""
        unchanged = not self._computed and self.call is call  # computed values may have been changed in place
        *parts, factor = self.parts
        if not unchanged or any(need and part is None for need, part in zip(needed, parts, strict=True)):
            return None
        hidden, weight, _ = self.made_of
        dhidden = scaled(parts[0], self.factor, hidden.dtype)
        if dhidden is not None and self.rows is not None:
            dhidden = dhidden.new_zeros(hidden.flatten(0, -2).shape).index_copy_(0, self.rows, dhidden)
        dweight = scaled(parts[1] if factor is None else factor, self.factor / self.scale, weight.dtype)
        dweight = dweight if factor is None else parts[1].t() @ dweight
        dbias = scaled(parts[2], self.factor, weight.dtype)
        return dhidden if dhidden is None else dhidden.view(hidden.shape), dweight, dbias


def _scaling(func: Any, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[float | None, torch.dtype]:
    """Return (factor, dtype) of an operation that scales x by a number or converts it; factor is None for others."""
    dtype, number = kwargs.get("dtype") or x.dtype, args[1] if len(args) == 2 and not kwargs else None
    if func is aten._to_copy.default and "dtype" in kwargs:
        same = {"dtype": dtype, "device": x.device, "layout": x.layout}  # autograd's conversion in backward passes them
        return None if any(value and value != same.get(name) for name, value in kwargs.items()) else 1.0, dtype
    if func not in (aten.mul.Tensor, aten.div.Tensor) or not isinstance(number, int | float) or number == 0:
        return None, dtype
    return (number if func is aten.mul.Tensor else 1 / number) if math.isfinite(number) else None, dtype


class _Head(torch.autograd.Function):
    """`F.linear` with deferred output, computed from `copies` if given. freed: FSDP frees weight after the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, copies: tuple | None, freed: bool) -> DeferredLogits:
        ctx.save_for_backward(hidden, weight)
        made_of = tuple(None if x is None else x.detach() for x in copies or (hidden, weight, bias))
        ctx.call, ctx.freed = {"gone": False}, freed
        return DeferredLogits._create(
            (*hidden.shape[:-1], weight.shape[0]), hidden.dtype, made_of=made_of, versions=_versions(*made_of),
            call=ctx.call, steps=(), scale=1.0, weight=weight, bias=bias,
            needs_grad=[x is not None and x.requires_grad for x in (hidden, weight, bias)],
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        needed, grads = ctx.needs_input_grad[:3], None
        if isinstance(grad, DeferredGradient) and not torch.is_grad_enabled():
            grads = grad.gradients(ctx.call, needed)
        if grads is None:
            rows = grad.flatten(0, -2)
            grads = (
                grad @ weight if needed[0] else None,
                rows.t() @ hidden.flatten(0, -2) if needed[1] else None,
                rows.sum(0) if needed[2] else None,
            )
        ctx.call["gone"] |= ctx.freed
        return *grads, None, None


def deferred_logits(hidden: Any, weight: Any, bias: Any, sharded: bool = False, keep: bool = False) -> DeferredLogits:
    """Return `F.linear(hidden, weight, bias)`, computed when first used.
    sharded: FSDP all-gathers the weight and frees it after the backward, or with `keep` after the forward. With `keep`
    the logits hold a copy of weight and bias."""
    original = weight
    hidden, weight, bias = (None if x is None else x.to(backends.matmul_dtype(x)) for x in (hidden, weight, bias))
    sharded &= original is weight  # else the conversion has made a copy
    copies = [None if x is None else x.detach().clone() for x in (weight, bias)] if sharded and keep else None
    return _Head.apply(hidden, weight, bias, copies and (hidden, *copies), sharded and not keep)


def next_tokens(x_BS: torch.Tensor, fill: int = -100, distance: int = 1) -> torch.Tensor:
    """Return rows shifted left by `distance` and filled up with `fill`. Of labels: the target of each position."""
    return F.pad(x_BS, (0, distance), value=fill)[..., distance:]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    labelled: int | None = None,
    counts: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Return Transformers' `ForCausalLMLoss`, a float32 scalar, without computing logits that are deferred.

    logits [B, S, V]; labels [B, S], which this function shifts, or shift_labels [B, S]. The loss is the sum over
    labelled tokens divided by num_items_in_batch, or their mean if that is None. labelled: the number of labelled
    tokens if known; then the head computes only these. counts: whether to set `statistics` on deferred logits.
    """
    targets = labels if shift_labels is None else shift_labels
    deferred: Any = logits if isinstance(logits, DeferredLogits) and _versions(logits) == [0] else None  # not edited
    if deferred is None or logits.shape != (*targets.shape, vocab_size):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    deferred.check_weight()
    if shift_labels is None:
        targets = next_tokens(labels, ignore_index)
    (hidden, weight, bias), scale, rows = deferred.made_of, deferred.scale, None
    targets = all_targets = targets.reshape(-1).to(hidden.device)
    hidden = hidden.flatten(0, -2)
    if labelled and ignore_index == -100 and labelled < MOST_LABELLED * len(targets):
        rows = torch.nonzero_static(targets != ignore_index, size=labelled).flatten()
        hidden, targets = hidden.index_select(0, rows), targets[rows]
    if scale != 1:
        hidden, bias = hidden * scale, None if bias is None else bias * scale

    attributes: dict[str, Any] = {name: getattr(deferred, name) for name in ("versions", "call", "steps", "scale")}
    attributes |= {"shape": logits.shape, "dtype": logits.dtype, "ignore_index": ignore_index}
    needed = [needs and logits.requires_grad and torch.is_grad_enabled() for needs in deferred.needs_grad]
    loss = linear_cross_entropy(hidden, weight, bias, targets, num_items_in_batch, ignore_index, needed, counts)
    deferred.statistics = loss.statistics
    return _Loss.apply(logits, attributes, *loss[:3], *loss.parts, *deferred.made_of, all_targets, rows)


class _Loss(torch.autograd.Function):
    """total / count. Its backward returns a `DeferredGradient` for the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Any, attributes: dict[str, Any], total: torch.Tensor, count: torch.Tensor, *saved: Any
    ) -> torch.Tensor:
        ctx.attributes = attributes
        ctx.save_for_backward(count, *saved)  # autograd frees them after the backward and detects changes in place
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, labelled, *parts_and_inputs, targets, rows = ctx.saved_tensors
        parts, made_of = parts_and_inputs[:4], parts_and_inputs[4:]
        # without labels the loss is nan (divided by 0), but gradients are zero, as in PyTorch
        factor = (grad_output / count).masked_fill(labelled == 0, 0.0).reshape(1)
        details = {"parts": parts, "factor": factor, "targets": targets, "rows": rows}
        gradient = DeferredGradient._create(made_of=made_of, **ctx.attributes, **details)
        return gradient, *[None] * (2 + len(ctx.saved_tensors))
