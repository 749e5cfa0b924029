"""The language-model head that never holds [tokens, vocabulary] logits in training.

In a call that `defers` (records.py) the head returns `DeferredLogits`: to autograd the head's output like any other,
but the values are computed only if somebody looks at them. `causal_lm_loss`, in the place of Transformers'
`ForCausalLMLoss`, does not look: it computes the loss from the hidden states. The gradient that it sends back to the
logits is deferred as well (`DeferredGradient`) and carries the gradients of the head's inputs. So autograd's graph is
stock's, and whoever hooks, differentiates by, edits or copies the logits finds what stock has.
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

MOST_LABELLED = 0.9  # of all tokens: with more, leaving the others out costs more than it saves
aten = torch.ops.aten


class FastHead(Fast):
    """Twin of the `nn.Linear` that makes the logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        call = None if is_traced() else current.get()
        if call is None or not call.defers or not type(self.weight.data) is type(input.data) is torch.Tensor:
            return super().forward(input)
        unit = self if isinstance(self, FSDPModule) else call.model
        if unit is not self and not is_unmodified(self):
            # DeepSpeed's ZeRO-3 is one: it takes the weight away when the head has run
            backends.warn_once(
                f"somebody put hooks on the head of this {type(unit).__name__}, or replaced its forward: "
                f"it makes whole logits."
            )
            return super().forward(input)
        _heads().add(self)
        sharded = isinstance(unit, FSDPModule)
        frees = sharded and any(
            group.post_forward_mesh_info is not None for group in fsdp_units(unit)
        )  # after forwards
        return deferred_logits(input, self.weight, self.bias, sharded, frees)


@functools.cache
def _heads() -> weakref.WeakSet[nn.Module]:
    """Heads that deferred logits, whose changes are counted: many optimizers, PyTorch's fused ones among them, change
    weights past autograd's count."""
    heads = weakref.WeakSet[nn.Module]()

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = {id(parameter): parameter for head in heads for parameter in head.parameters()}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        torch.autograd.graph.increment_version([weights[key] for key in weights.keys() & stepped])

    register_optimizer_step_post_hook(count)
    return heads


_LATE = (
    "These logits were not computed in the forward, and now they cannot be: {}. Look at outputs.logits before that "
    "(outputs.logits.detach().clone() keeps them), or load the model with fused={{'linear_cross_entropy': False}}."
)


def _versions(*tensors: torch.Tensor | None) -> list[int]:
    """Autograd's counts of changes in place."""
    return [0 if x is None or x.is_inference() else x._version for x in tensors]


class _Deferred(torch.Tensor):
    """Logits [..., V] = hidden [..., H] @ weightᵀ + bias, and then some `steps`, which multiply by `scale` in all; or
    what follows from them (`_make`). Computed when first used, once.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    made_of: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # hidden, weight, bias, without history
    versions: list[int]  # of these when the head was called
    call: dict[str, bool]  # this call of the head; "gone": FSDP has freed the weight, or will gather another
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    scale: float
    _computed: list[torch.Tensor]  # empty or one; aliases share it
    _make: Callable[[], torch.Tensor]
    _times: Callable[[float, torch.dtype], dict[str, Any] | None]  # what changes in a product; None: it is computed

    @classmethod
    def _of(cls, shape: Any, dtype: torch.dtype, **attributes: Any) -> Any:
        self = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=attributes["made_of"][0].device)
        self.__dict__.update({"_computed": []} | attributes)
        return self

    def refuse_late(self) -> None:
        """Raise RuntimeError where the head's weight is no longer what it was."""
        if self.call["gone"]:
            raise RuntimeError(_LATE.format("FSDP has taken the head's weight away"))
        if _versions(*self.made_of) != self.versions:
            raise RuntimeError(_LATE.format("the head's weight has changed (optimizer.step()?)"))

    def _logits(self) -> torch.Tensor:
        self.refuse_late()
        logits = F.linear(*self.made_of)
        for step in self.steps:
            logits = step(logits)
        return logits

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """As an ordinary tensor, without autograd's history."""
        if not self._computed:
            self._computed.append(self._make())
        return self._computed[0]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if isinstance(first, _Deferred):
            if func in (aten.detach.default, aten.alias.default):
                return first._of(first.shape, first.dtype, **first.__dict__)
            factor, dtype = (None, first.dtype) if first._computed else _product(func, first, args, kwargs)
            changed = None if factor is None else first._times(factor, dtype)
            if changed is not None:
                return first._of(first.shape, dtype, **first.__dict__ | changed | {"_computed": []})
        plain_args, plain_kwargs = tree_map_only(_Deferred, _Deferred.values, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if not func._schema.is_mutable:
            return out
        deferred = {id(x.values()): x for x in tree_leaves((args, kwargs)) if isinstance(x, _Deferred)}
        return tree_map(lambda x: deferred.get(id(x), x), out)

    def _plain(self) -> torch.Tensor:
        return self.values().detach().requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._plain(), memo) if self.is_leaf else super().__deepcopy__(memo)  # which refuses


# what does not go through PyTorch's dispatcher
for _name in "numpy tolist data_ptr untyped_storage storage __dlpack__ __reduce_ex__ __repr__".split():
    setattr(_Deferred, _name, lambda self, *args, _name=_name, **kwargs: getattr(self._plain(), _name)(*args, **kwargs))


class DeferredLogits(_Deferred):
    """The head's output. A conversion to a wider dtype and a product with a number (Granite, Cohere) are deferred too.

    weight, bias: the head's, for more logits by it. statistics: of the predictions, if the loss was to make them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    wanted: list[bool]  # which of hidden states, weight and bias learn
    statistics: Statistics | None = None

    _make = _Deferred._logits

    def _times(self, factor: float, dtype: torch.dtype) -> dict[str, Any] | None:
        if torch.promote_types(self.dtype, dtype) != dtype:
            return None
        return {"steps": (*self.steps, lambda logits: logits.to(dtype) * factor), "scale": self.scale * factor}


class DeferredGradient(_Deferred):
    """The loss' gradient of deferred logits: factor · (softmax(logits) - onehot(targets)), 0 where there is no target.

    parts: as of `Loss`, but the hidden states' are of those rows that `rows` names, or all.
    """

    parts: tuple[Any, ...]
    factor: torch.Tensor  # [1], float32
    targets: torch.Tensor
    rows: torch.Tensor | None
    ignore_index: int

    def _make(self) -> torch.Tensor:
        logits, ignored = self._logits().flatten(0, -2), (self.targets == self.ignore_index)[:, None]
        grad = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        targets = self.targets[:, None].masked_fill(ignored, 0)
        grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
        return grad.mul_(self.factor).masked_fill_(ignored, 0.0).to(self.dtype).view(self.shape)

    def _times(self, factor: float, dtype: torch.dtype) -> dict[str, Any]:
        return {"factor": self.factor * factor}

    def of_inputs(self, call: dict[str, bool], needed: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...] | None:
        """The gradients of the inputs of this call of a head, if they are what it needs."""
        known = not self._computed and self.call is call  # else somebody may have changed it in place
        *parts, factor = self.parts
        if not known or any(need and part is None for need, part in zip(needed, parts, strict=True)):
            return None
        hidden, weight, _ = self.made_of
        dhidden = scaled(parts[0], self.factor, hidden.dtype)
        if dhidden is not None and self.rows is not None:
            dhidden = dhidden.new_zeros(hidden.flatten(0, -2).shape).index_copy_(0, self.rows, dhidden)
        dweight = scaled(parts[1] if factor is None else factor, self.factor / self.scale, weight.dtype)
        dweight = dweight if factor is None else parts[1].t() @ dweight
        dbias = scaled(parts[2], self.factor, weight.dtype)
        return dhidden if dhidden is None else dhidden.view(hidden.shape), dweight, dbias


def _product(func: Any, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[float | None, torch.dtype]:
    """(factor, dtype) of an operation that multiplies x by a number or converts it; factor None if it does more."""
    dtype, number = kwargs.get("dtype") or x.dtype, args[1] if len(args) == 2 and not kwargs else None
    if func is aten._to_copy.default and "dtype" in kwargs:
        stays = {"dtype": dtype, "device": x.device, "layout": x.layout}  # autograd names them when it converts back
        return None if any(value and value != stays.get(name) for name, value in kwargs.items()) else 1.0, dtype
    if func not in (aten.mul.Tensor, aten.div.Tensor) or not isinstance(number, int | float) or number == 0:
        return None, dtype
    return (number if func is aten.mul.Tensor else 1 / number) if math.isfinite(number) else None, dtype


class _Head(torch.autograd.Function):
    """`F.linear`, whose output is deferred."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, kept: tuple | None, leaves: bool) -> DeferredLogits:
        ctx.save_for_backward(hidden, weight)
        made_of = tuple(None if x is None else x.detach() for x in kept or (hidden, weight, bias))
        ctx.call, ctx.leaves = {"gone": False}, leaves
        return DeferredLogits._of(
            (*hidden.shape[:-1], weight.shape[0]), hidden.dtype, made_of=made_of, versions=_versions(*made_of),
            call=ctx.call, steps=(), scale=1.0, weight=weight, bias=bias,
            wanted=[x is not None and x.requires_grad for x in (hidden, weight, bias)],
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        needed, grads = ctx.needs_input_grad[:3], None
        if isinstance(grad, DeferredGradient) and not torch.is_grad_enabled():
            grads = grad.of_inputs(ctx.call, needed)
        if grads is None:
            rows = grad.flatten(0, -2)
            grads = (
                grad @ weight if needed[0] else None,
                rows.t() @ hidden.flatten(0, -2) if needed[1] else None,
                rows.sum(0) if needed[2] else None,
            )
        ctx.call["gone"] |= ctx.leaves
        return *grads, None, None


def deferred_logits(hidden: Any, weight: Any, bias: Any, sharded: bool = False, keep: bool = False) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, computed when first looked at.

    sharded: FSDP gathers the weight and frees it after the backward; or, with `keep`, after the forward, and then the
    logits keep a copy as long as they live.
    """
    given = weight
    hidden, weight, bias = (None if x is None else x.to(backends.matmul_dtype(x)) for x in (hidden, weight, bias))
    sharded &= given is weight  # else it is a copy already
    copies = [None if x is None else x.detach().clone() for x in (weight, bias)] if sharded and keep else None
    return _Head.apply(hidden, weight, bias, copies and (hidden, *copies), sharded and not keep)


def next_tokens(x_BS: torch.Tensor, fill: int = -100, distance: int = 1) -> torch.Tensor:
    """Rows shifted to the left by `distance`, `fill` at their end. Of labels: what each position is to predict."""
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
    """Transformers' `ForCausalLMLoss`, and its equal that goes past the logits if they are deferred.

    logits [B, S, V], labels [B, S] (shifted here) or shift_labels [B, S]. Sum over labelled tokens divided by
    num_items_in_batch, or their mean if that is None. labelled: how many tokens have a label, if that is known: then
    others do not pass through the head. counts: whether deferred logits get `statistics`. Returns a float32 scalar.
    """
    targets = labels if shift_labels is None else shift_labels
    known: Any = logits if isinstance(logits, DeferredLogits) and _versions(logits) == [0] else None  # nobody edited it
    if known is None or logits.shape != (*targets.shape, vocab_size):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    known.refuse_late()
    if shift_labels is None:
        targets = next_tokens(labels, ignore_index)
    (hidden, weight, bias), scale, rows = known.made_of, known.scale, None
    targets = all_targets = targets.reshape(-1).to(hidden.device)
    hidden = hidden.flatten(0, -2)
    if labelled and ignore_index == -100 and labelled < MOST_LABELLED * len(targets):
        rows = torch.nonzero_static(targets != ignore_index, size=labelled).flatten()
        hidden, targets = hidden.index_select(0, rows), targets[rows]
    if scale != 1:
        hidden, bias = hidden * scale, None if bias is None else bias * scale

    attributes: dict[str, Any] = {name: getattr(known, name) for name in ("versions", "call", "steps", "scale")}
    attributes |= {"shape": logits.shape, "dtype": logits.dtype, "ignore_index": ignore_index}
    wanted = [want and logits.requires_grad and torch.is_grad_enabled() for want in known.wanted]
    found = linear_cross_entropy(hidden, weight, bias, targets, num_items_in_batch, ignore_index, wanted, counts)
    known.statistics = found.statistics
    return _Loss.apply(logits, attributes, *found[:3], *found.parts, *known.made_of, all_targets, rows)


class _Loss(torch.autograd.Function):
    """total / count, whose gradient, that of the logits, is deferred."""

    @staticmethod
    def forward(
        ctx: Any, logits: Any, attributes: dict[str, Any], total: torch.Tensor, count: torch.Tensor, *kept: Any
    ) -> torch.Tensor:
        ctx.attributes = attributes
        ctx.save_for_backward(count, *kept)  # autograd drops it after the backward; nobody may change it before
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, labelled, *parts_and_inputs, targets, rows = ctx.saved_tensors
        parts, made_of = parts_and_inputs[:4], parts_and_inputs[4:]
        # nothing to learn from: the loss is nan where it is divided by 0, but gradients are zero, as in PyTorch
        factor = (grad_output / count).masked_fill(labelled == 0, 0.0).reshape(1)
        of_loss = {"parts": parts, "factor": factor, "targets": targets, "rows": rows}
        gradient = DeferredGradient._of(made_of=made_of, **ctx.attributes, **of_loss)
        return gradient, *[None] * (2 + len(ctx.saved_tensors))
