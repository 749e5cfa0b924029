"""State of one call of a fused model, shared by its base model, layers, head and loss through a context variable."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from expertmesh.backends import in_fullgraph


@dataclass(eq=False)
class Call:
    """model: the called model, or a base model called directly. targets: the label of each position [B, S], -100 for
    none; None without labels. defers: the head returns `DeferredLogits`. counts: the loss attaches `Statistics` of
    the predictions to them. labelled: number of positions with a target, None until it was read from the device.
    token_counts: for each group (number of tokens on this rank, largest number on any rank), set by the first layer.
    predicts: multi-token prediction is trained in this call. It reads the main model's `embeds` and last `hidden`
    [B, S, H], the caller's `position_ids`, and the decoder layers' keyword arguments, `layer_inputs`.
    """

    model: Any
    targets: torch.Tensor | None = None
    defers: bool = False
    counts: bool = False
    predicts: bool = False
    labelled: int | None = None
    token_counts: dict[Any, tuple[int, int]] = field(default_factory=dict)
    embeds: Any = None
    hidden: Any = None
    position_ids: Any = None
    layer_inputs: dict[Any, dict[str, Any]] = field(default_factory=dict)


current: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def in_call(call: Call) -> Iterator[None]:
    """Context manager that makes this call `current`."""
    token = current.set(call)
    try:
        yield
    finally:
        current.reset(token)


def call_of(model: Any) -> Call:
    """Return the current call if it is of this model or of the model around this base model, else a default `Call`."""
    call = None if in_fullgraph() else current.get()
    return call if call is not None and model in (call.model, call.model.base_model) else Call(model)
