"""The language-model head that never holds [tokens, vocabulary] logits in training.

Within `deferring()` the head returns `DeferredLogits`: to autograd the head's output like any other, but its values are
computed only if somebody looks at them. `causal_lm_loss`, in the place of Transformers' `ForCausalLMLoss`, does not: it
goes from hidden states to the loss directly, and the gradient that it sends back to the logits is deferred as well
(`DeferredGradient`): it brings the gradients of the head's inputs along. So autograd's graph is stock's, and whoever
hooks, differentiates by, edits or copies the logits finds what stock has. Within `counting()` the logits also bring the
`statistics` of the predictions, which the loss makes on its way.
"""

import contextlib
import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss

from expertmesh import backends
from expertmesh.kernels.linear_cross_entropy import Statistics, Through, linear_cross_entropy, scaled
from expertmesh.layers.fast import Fast, traced, untouched

MOST_LABELLED = 0.9  # of all tokens: from there on it is not worth while to leave the others out
aten = torch.ops.aten

_deferring: ContextVar[Any] = ContextVar("deferring_logits", default=None)
_counting: ContextVar[bool] = ContextVar("counting_predictions", default=False)


@contextlib.contextmanager
def deferring(model: nn.Module | None) -> Iterator[None]:
    """Within: the fast head of `model` returns `DeferredLogits`."""
    token = _deferring.set(model)
    try:
        yield
    finally:
        _deferring.reset(token)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Within: a loss that goes past deferred logits leaves its `Statistics` in their `statistics`."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


class FastHead(Fast):
    """Twin of the `nn.Linear` that makes the logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        model = _deferring.get()
        if model is None or traced() or not type(self.weight.data) is type(input.data) is torch.Tensor:
            return super().forward(input)
        unit = self if isinstance(self, FSDPModule) else model
        if unit is model and not untouched(self):
            # DeepSpeed's ZeRO-3 is one: it takes the weight away when the head has run
            _tell_of_hooks(type(model).__name__)
            return super().forward(input)
        _heads().add(self)
        sharded = isinstance(unit, FSDPModule)
        return deferred_logits(input, self.weight, self.bias, sharded, sharded and _reshards(unit))


@functools.cache
def _tell_of_hooks(name: str) -> None:
    backends.logger().warning(
        "expertmesh: somebody put hooks on the head of this %s, or replaced its forward: it makes whole logits.", name
    )


@functools.cache
def _heads() -> weakref.WeakSet[nn.Module]:
    """Heads that deferred logits. Optimizers change weights in place, but many, PyTorch's fused ones among them, past
    autograd's count of such changes; so changes of heads are counted here.
    """
    heads = weakref.WeakSet[nn.Module]()

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = {id(parameter): parameter for head in heads for parameter in head.parameters()}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        torch.autograd.graph.increment_version([weights[key] for key in weights.keys() & stepped])

    register_optimizer_step_post_hook(count)
    return heads


def _reshards(unit: Any) -> bool:
    """Whether FSDP takes the unit's weights away after its forward."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one only, before PyTorch 2.13
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


@dataclass
class _Recipe:
    """How logits [..., V] are made: hidden [..., H] @ weightᵀ + bias, and then `steps`, which multiply by `scale` in
    all. versions: autograd's counts of changes in place when the head was called.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    versions: list[int]
    head: dict[str, bool]  # the call of the head; "gone": FSDP has taken the weight away, or will bring another
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    scale: float = 1.0

    @torch.no_grad()
    def make(self) -> torch.Tensor:
        """The logits. Raises RuntimeError where the head's weight is no longer what it was."""
        if self.head["gone"]:
            raise RuntimeError(_LATE.format(what="FSDP has taken the head's weight away"))
        if _versions(self.hidden, self.weight, self.bias) != self.versions:
            raise RuntimeError(_LATE.format(what="the head's weight has changed (optimizer.step()?)"))
        logits = F.linear(self.hidden, self.weight, self.bias)
        for step in self.steps:
            logits = step(logits)
        return logits


_LATE = (
    "These logits were not computed in the forward, and now they cannot be: {what}. Look at outputs.logits before that "
    "(outputs.logits.detach().clone() keeps them), or load the model with fused={{'linear_cross_entropy': False}}."
)


def _versions(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if x is None or x.is_inference() else x._version for x in tensors]


class _Deferred(torch.Tensor):
    """A tensor that is computed when first used, once. Subclasses say how, and what waits on (`_later`)."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    _computed: list[torch.Tensor]  # empty or one; aliases share it

    @classmethod
    def _like(cls, like: torch.Tensor, shape: Any, dtype: torch.dtype, **attributes: Any) -> Any:
        self = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        self.__dict__.update({"_computed": []} | attributes)
        return self

    def _make(self) -> torch.Tensor:
        raise AssertionError

    def _later(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> "_Deferred | None":
        """The result of this operation on self, if it need not be computed either."""
        raise AssertionError

    def values(self) -> torch.Tensor:
        """As an ordinary tensor, without autograd's history."""
        if not self._computed:
            self._computed.append(self._make())
        return self._computed[0]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0], _Deferred) and not args[0]._computed:
            later = args[0]._later(func, args[1:], kwargs)
            if later is not None:
                return later
        if func in _ALIASING and isinstance(args[0], DeferredLogits):
            return args[0]._alias()
        plain_args, plain_kwargs = tree_map_only(_Deferred, _Deferred.values, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if not func._schema.is_mutable:
            return out
        deferred = {id(x.values()): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, _Deferred)}
        return tree_map(lambda x: deferred.get(id(x), x), out)

    def _plain(self) -> torch.Tensor:
        return self.values().detach().requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._plain(), memo) if self.is_leaf else super().__deepcopy__(memo)  # which refuses


def _of_plain(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self._plain(), name)(*args, **kwargs)


for _name in "numpy tolist data_ptr untyped_storage storage __dlpack__ __reduce_ex__ __repr__".split():
    setattr(_Deferred, _name, _of_plain(_name))  # what is no operation of PyTorch's dispatcher


class DeferredLogits(_Deferred):
    """The head's output [..., V], computed when first looked at.

    A conversion to a wider dtype and a product with a number (Granite, Cohere) are deferred too. weight, bias: the
    head's, for more logits by it. statistics: see `counting`.
    """

    recipe: _Recipe
    weight: torch.Tensor
    bias: torch.Tensor | None
    wanted: list[bool]  # which of hidden states, weight and bias learn
    _found: list[Statistics]

    @property
    def statistics(self) -> Statistics | None:
        return self._found[0] if self._found else None

    @property
    def edited(self) -> bool:
        """Whether somebody changed the logits in place."""
        return _versions(self) != [0]

    def _make(self) -> torch.Tensor:
        return self.recipe.make()

    def _alias(self) -> "DeferredLogits":
        return self._like(self, self.shape, self.dtype, **self.__dict__)

    def _then(self, step: Callable[[torch.Tensor], torch.Tensor], scale: float, dtype: torch.dtype) -> "DeferredLogits":
        recipe = replace(self.recipe, steps=(*self.recipe.steps, step), scale=self.recipe.scale * scale)
        return self._like(self, self.shape, dtype, **self.__dict__ | {"recipe": recipe, "_computed": []})

    def _later(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> "DeferredLogits | None":
        factor, dtype = _factor(func, args, kwargs), _new_dtype(func, kwargs)
        if factor is not None:
            return self._then(lambda logits: func(logits, *args), factor, self.dtype)
        if dtype is not None and torch.promote_types(self.dtype, dtype) == dtype:
            return self._then(lambda logits: logits.to(dtype), 1.0, dtype)
        return None


class DeferredGradient(_Deferred):
    """The loss' gradient of deferred logits: scale · (softmax(logits) - onehot(targets)), 0 where there is no target.

    parts: the gradients of the head's hidden states (of those rows that `index` names, or all), weight and bias that
    follow from it, but for `scale`; None for what does not learn.
    """

    recipe: _Recipe
    parts: tuple[torch.Tensor | None, ...]
    scale: torch.Tensor  # [1], float32
    targets: torch.Tensor
    index: torch.Tensor | None
    ignore_index: int

    def _make(self) -> torch.Tensor:
        ignored = (self.targets == self.ignore_index)[:, None]
        logits = self.recipe.make().flatten(0, -2)
        grad = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        targets = self.targets[:, None].masked_fill(ignored, 0)
        grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
        return grad.mul_(self.scale).masked_fill_(ignored, 0.0).to(self.dtype).view(self.shape)

    def _later(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> "DeferredGradient | None":
        factor, dtype = _factor(func, args, kwargs), _new_dtype(func, kwargs)
        if factor is None and dtype is None and func not in _ALIASING:
            return None
        scale = self.scale if factor is None else self.scale * factor
        return self._like(self, self.shape, dtype or self.dtype, **self.__dict__ | {"scale": scale, "_computed": []})

    def of_inputs(self, head: dict[str, bool], needed: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...] | None:
        """The gradients of the inputs of this call of a head, if they are what it needs."""
        known = not self._computed and self.recipe.head is head  # else somebody may have changed it in place
        if not known or any(need and part is None for need, part in zip(needed, self.parts, strict=True)):
            return None
        hidden, weight, bias = self.recipe.hidden, self.recipe.weight, self.recipe.bias
        dhidden = scaled(self.parts[0], self.scale, hidden.dtype)
        if dhidden is not None and self.index is not None:
            dhidden = dhidden.new_zeros(hidden.flatten(0, -2).shape).index_copy_(0, self.index, dhidden)
        return (
            None if dhidden is None else dhidden.view(hidden.shape),
            scaled(self.parts[1], self.scale / self.recipe.scale, weight.dtype),
            None if bias is None else scaled(self.parts[2], self.scale, bias.dtype),
        )


def _gradient(
    shape: Any, dtype: torch.dtype, recipe: _Recipe, ignore_index: int, parts: tuple, scale: torch.Tensor, *saved: Any
) -> DeferredGradient:
    hidden, weight, bias, targets, index = saved
    recipe = replace(recipe, hidden=hidden, weight=weight, bias=bias)
    of_loss = {"parts": parts, "scale": scale, "targets": targets, "index": index, "ignore_index": ignore_index}
    return DeferredGradient._like(hidden, shape, dtype, recipe=recipe, **of_loss)


_ALIASING = {aten.detach.default, aten.alias.default}


def _factor(func: Any, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """What this operation multiplies by, if it does nothing else and that is a number."""
    if func not in (aten.mul.Tensor, aten.div.Tensor) or len(args) != 1 or kwargs:
        return None
    number = args[0]
    if isinstance(number, torch.Tensor):
        if number.ndim or number.device.type != "cpu" or isinstance(number, _Deferred):
            return None
        number = number.item()
    if not isinstance(number, int | float) or not math.isfinite(number) or number == 0:
        return None
    return number if func is aten.mul.Tensor else 1 / number


def _new_dtype(func: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that this operation converts to, if it does nothing else."""
    others = any(value for name, value in kwargs.items() if name != "dtype")
    return None if func is not aten._to_copy.default or others else kwargs.get("dtype")


class _Head(torch.autograd.Function):
    """`F.linear`, whose output is deferred."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, recipe: _Recipe, leaves: bool) -> Any:
        ctx.save_for_backward(hidden, weight)
        ctx.head, ctx.leaves = recipe.head, leaves
        wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        of_head = {"recipe": recipe, "weight": weight, "bias": bias, "wanted": wanted, "_found": []}
        return DeferredLogits._like(hidden, (*hidden.shape[:-1], weight.shape[0]), hidden.dtype, **of_head)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads = None
        if isinstance(grad, DeferredGradient) and not torch.is_grad_enabled():
            grads = grad.of_inputs(ctx.head, needed)
        if grads is None:
            rows = grad.flatten(0, -2)
            grads = (
                grad @ weight if needed[0] else None,
                rows.t() @ hidden.flatten(0, -2) if needed[1] else None,
                rows.sum(0) if needed[2] else None,
            )
        ctx.head["gone"] |= ctx.leaves
        return *grads, None, None


def deferred_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sharded: bool = False,
    keep: bool = False,
) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, computed when first looked at.

    sharded: FSDP gathers the weight, and takes it away after the backward; or, with `keep`, after the forward. Then a
    copy is kept for as long as the logits are.
    """
    device = hidden.device.type
    kept = weight
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    sharded &= kept is weight  # else it is a copy already
    inputs = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    if sharded and keep:
        inputs[1:] = [None if x is None else x.clone() for x in inputs[1:]]
    recipe = _Recipe(*inputs, versions=_versions(*inputs), head={"gone": False})  # type: ignore[arg-type]
    return _Head.apply(hidden, weight, bias, recipe, sharded and not keep)


def next_tokens(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """What each position [B, S] is to predict: the label behind it."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    labelled: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Transformers' `ForCausalLMLoss`, and its equal that goes past the logits if they are deferred.

    logits [B, S, V], labels [B, S] (shifted here) or shift_labels [B, S]. Sum over labelled tokens divided by
    num_items_in_batch, or their mean if that is None. labelled: how many tokens have a label, if that is known: then
    others do not pass through the head. Returns a float32 scalar.
    """
    targets = labels if shift_labels is None else shift_labels
    deferred = isinstance(logits, DeferredLogits) and not logits.edited
    if not (deferred and logits.shape == (*targets.shape, vocab_size)):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        targets = next_tokens(labels, ignore_index)
    recipe, index = logits.recipe, None
    hidden, bias = recipe.hidden.flatten(0, -2), recipe.bias
    targets = targets.reshape(-1).to(hidden.device)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    all_targets = targets
    if labelled and ignore_index == -100 and labelled < MOST_LABELLED * len(targets):
        index = torch.nonzero_static(targets != ignore_index, size=labelled).flatten()
        hidden, targets = hidden.index_select(0, index), targets[index]
    if recipe.scale != 1:
        hidden, bias = hidden * recipe.scale, None if bias is None else bias * recipe.scale
    # autograd keeps tensors for as long as they are needed, and sees to it that nobody changes them
    saved = recipe.hidden, recipe.weight, recipe.bias, all_targets, index
    without: Any = replace(recipe, hidden=None, weight=None, bias=None)  # type: ignore[arg-type]
    wanted = [want and logits.requires_grad for want in logits.wanted]
    gradient = functools.partial(_gradient, logits.shape, logits.dtype, without, ignore_index)
    return linear_cross_entropy(
        hidden,
        recipe.weight,
        targets,
        bias=bias,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        statistics=logits._found if _counting.get() else None,
        through=Through(logits, wanted, gradient, saved),
    )


def why_not_head(head: nn.Module | None) -> str | None:
    """Why this output embedding cannot defer its logits, or None."""
    if head is None:
        return "the model has no output embedding"
    if type(head) is not nn.Linear and not isinstance(head, FastHead):
        return f"its head is a {type(head).__name__}, not nn.Linear"
    return None
