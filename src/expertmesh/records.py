"""One call of a fused model: what it asks of its base model, head and loss, and what its layers find out once."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from expertmesh.backends import in_fullgraph


@dataclass(eq=False)
class Call:
    """model: the one called, or a base model that was called by itself. targets: [B, S], what each position is to
    predict, -100 for nothing; None without labels. defers: the head returns `DeferredLogits`. counts: the loss gives
    these the `Statistics` of the predictions. labelled: how many positions have a target, once the device was asked.
    agreed: for each group of ranks the number of tokens here and the largest on any rank, once the hosts asked.

    predicts: multi-token prediction learns in this call. It takes from the main model embeddings and last hidden state
    [B, S, H], the caller's positions, and the keywords of decoder layers.
    """

    model: Any
    targets: torch.Tensor | None = None
    defers: bool = False
    counts: bool = False
    predicts: bool = False
    labelled: int | None = None
    agreed: dict[Any, tuple[int, int]] = field(default_factory=dict)
    embeds: Any = None
    hidden: Any = None
    position_ids: Any = None
    layer_inputs: dict[Any, dict[str, Any]] = field(default_factory=dict)


current: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def in_call(call: Call) -> Iterator[None]:
    """Within: `current` is this call."""
    token = current.set(call)
    try:
        yield
    finally:
        current.reset(token)


def call_of(model: Any) -> Call:
    """The call of this model, or of the one whose base model it is; one that asks for nothing if there is none."""
    call = None if in_fullgraph() else current.get()
    return call if call is not None and model in (call.model, call.model.base_model) else Call(model)
