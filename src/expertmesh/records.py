"""What must be known far down and no argument brings there through Transformers' code: of a loading, and of a forward.

Whoever begins one puts a record of it `within` reach; whoever is called inside reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Record = TypeVar("Record")


@dataclass(frozen=True)
class Loading:
    """How models are made inside.

    off: the fusions that are switched off. mtp: whether they get modules for multi-token prediction: "no"; "new", where
    the configuration has such modules; or "saved", where the checkpoint has their weights, too. complete: a checkpoint
    without some of its experts or routers is an error. quantized: what a checkpoint is to be dequantized from.
    """

    off: frozenset[str] = frozenset()
    mtp: str = "no"
    complete: bool = False
    quantized: Any = None


@dataclass
class Forward:
    """One forward of a model, from its entry down.

    base: the base model that it runs. targets: [B, S], what each position is to predict, -100 for nothing; None if
    nobody asks. labelled: how many positions have something to predict, once the device was asked. defers: the model
    whose head defers its logits. counts: the loss leaves its statistics in them. predictions: what modules for
    multi-token prediction learn from. num_tokens: for each group of ranks, how many tokens this rank has and the most
    that any has; None outside of a forward.
    """

    base: Any = None
    targets: torch.Tensor | None = None
    labelled: int | None = None
    defers: Any = None
    counts: bool = False
    predictions: Any = None
    num_tokens: dict[Any, tuple[int, int]] | None = field(default_factory=dict)


_OUTSIDE = Loading(), Forward(num_tokens=None)
LOADING: ContextVar[Loading] = ContextVar("loading", default=_OUTSIDE[0])
FORWARD: ContextVar[Forward] = ContextVar("forward", default=_OUTSIDE[1])


@contextmanager
def within(variable: ContextVar[Any], record: Record) -> Iterator[Record]:
    """Inside, this is the record of the loading or forward under way."""
    token = variable.set(record)
    try:
        yield record
    finally:
        variable.reset(token)


def forward_of(base: Any) -> Forward:
    """The forward under way if it is one of this base model, else a new one."""
    forward = FORWARD.get()
    return forward if forward.base is base else Forward(base)
