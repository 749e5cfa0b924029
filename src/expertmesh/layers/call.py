"""One call of a fused causal language model: what it asks of its base model, head and loss, wherever these run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.backends import in_one_graph


@dataclass(eq=False)
class Call:
    """targets: [B, S], what each position is to predict, -100 for nothing; None if nobody asks. defers: the head gives
    `DeferredLogits`. counts: the loss gives these the `Statistics` of the predictions. heard: what MTP modules learn
    from (`mtp.Heard`), if they do; then rows must not be taken apart. labelled: how many positions have something to
    predict, once the device was asked.
    """

    model: Any
    targets: torch.Tensor | None = None
    defers: bool = False
    counts: bool = False
    heard: Any = None
    labelled: int | None = None


current: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Within: this call."""
    token = current.set(call)
    try:
        yield
    finally:
        current.reset(token)


def call_of(model: Any) -> Call:
    """The call of this model, or of the one whose base model it is; one that asks for nothing if there is none."""
    call = None if in_one_graph() else current.get()
    return call if call is not None and model in (call.model, call.model.base_model) else Call(model)
