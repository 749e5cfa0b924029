"""The language-model head that never holds [tokens, vocabulary] logits in training.

Within `deferring()` the head returns `DeferredLogits` instead of logits: a tensor that knows its shape, dtype and
device and computes its values only if somebody touches them. `causal_lm_loss`, in the place of Transformers'
`ForCausalLMLoss`, recognises it and goes from hidden states to loss directly. So `model(..., labels=...)` needs no
logits, while `outputs.logits` still works, with gradients, for whoever asks. Within `counting()` it also brings the
`statistics` of the predictions, which the loss makes on its way.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss

from expertmesh.kernels.linear_cross_entropy import Statistics, linear_cross_entropy
from expertmesh.layers.fast import Fast

MOST_LABELLED = 0.9  # of all tokens: from there on it is not worth while to leave the others out

_deferring: ContextVar[bool] = ContextVar("deferring_logits", default=False)
_counting: ContextVar[bool] = ContextVar("counting_predictions", default=False)


@contextlib.contextmanager
def deferring(on: bool) -> Iterator[None]:
    """While `on`, fast heads return `DeferredLogits`."""
    token = _deferring.set(on)
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
        if not _deferring.get() or torch.compiler.is_compiling() or type(self.weight.data) is not torch.Tensor:
            return super().forward(input)
        return DeferredLogits(input, self.weight, self.bias)


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in "shape dtype device ndim layout is_cuda is_cpu is_sparse is_quantized is_meta".split()
} | {
    getattr(torch.Tensor, name)
    for name in "size dim numel __len__ is_floating_point is_complex element_size get_device".split()
}
_SCALING = {torch.Tensor.mul, torch.Tensor.div}
# a deferred tensor is no leaf and has no history of its own: frameworks that look for outputs to hook pass it by
_HISTORY = {getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "grad", "is_leaf")}


class DeferredLogits(torch.Tensor):
    """Logits [..., V] = hidden [..., H] @ weightᵀ + bias that are computed when first used.

    Metadata and conversions to a wider dtype cost nothing, and a product with a number (Granite, Cohere) is one with
    the hidden states; any other operation computes the values, once, with autograd. statistics: see `counting`.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: Statistics | None = None
    _computed: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> "DeferredLogits":
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            cast = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
        self = torch.Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], weight.shape[0]), dtype=dtype or hidden.dtype, device=hidden.device
        )
        self.hidden, self.weight, self.bias, self._computed = hidden, weight, bias, None
        return self

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor with its autograd history."""
        if self._computed is None:
            with torch._C.DisableTorchFunctionSubclass():
                self._computed = F.linear(self.hidden, self.weight, self.bias).to(self.dtype)
        return self._computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA or func in _HISTORY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        dtype = _wider_dtype(func, args, kwargs)
        if dtype is not None:
            self = args[0]
            if dtype == self.dtype:
                return self
            wider = DeferredLogits(self.hidden, self.weight, self.bias, dtype)
            wider.statistics = self.statistics  # Accelerate makes all outputs float32
            return wider
        if func in _SCALING and len(args) == 2 and isinstance(args[0], DeferredLogits):
            self, number = args
            if isinstance(number, int | float) and not kwargs:
                bias = None if self.bias is None else func(self.bias, number)
                return DeferredLogits(func(self.hidden, number), self.weight, bias, self.dtype)
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wider_dtype(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype asked for if this call does nothing but convert a deferred tensor to one that loses nothing."""
    if not (args and isinstance(args[0], DeferredLogits)) or kwargs:
        return None
    if func is torch.Tensor.float and len(args) == 1:
        dtype = torch.float32
    elif func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype):
        dtype = args[1]
    else:
        return None
    return dtype if torch.promote_types(args[0].dtype, dtype) == dtype else None


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
    if not (isinstance(logits, DeferredLogits) and logits.shape == (*targets.shape, vocab_size)):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        targets = next_tokens(labels, ignore_index)
    hidden = logits.hidden.flatten(0, -2)
    targets = targets.reshape(-1).to(hidden.device)
    if labelled and ignore_index == -100 and labelled < MOST_LABELLED * len(targets):
        index = torch.nonzero_static(targets != ignore_index, size=labelled).flatten()
        hidden, targets = hidden.index_select(0, index), targets[index]
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    found: list[Statistics] = []
    loss = linear_cross_entropy(
        hidden,
        logits.weight,
        targets,
        bias=logits.bias,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        statistics=found if _counting.get() else None,
    )
    logits.statistics = found[0] if found else None
    return loss


def why_not_head(head: nn.Module | None) -> str | None:
    """Why this output embedding cannot defer its logits, or None."""
    if head is None:
        return "the model has no output embedding"
    if type(head) is not nn.Linear and not isinstance(head, FastHead):
        return f"its head is a {type(head).__name__}, not nn.Linear"
    return None
