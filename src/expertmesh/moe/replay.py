"""Activation checkpointing that keeps the routing.

A router run again in backward can flip near-ties: the recomputed layer then sends tokens to other experts than the
forward did, which breaks the checkpoint ("recomputed tensors have different metadata") or, worse, the gradients. So the
choice of experts is recorded when a checkpointed layer first runs and replayed when it is recomputed.

`keep_routing` goes in as the `context_fn` of `torch.utils.checkpoint.checkpoint(use_reentrant=False)`; a fused model
does that by itself when `activation_checkpointing_enable()` is called.
"""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, TypeVar

Decision = TypeVar("Decision")

current: ContextVar["Region | None"] = ContextVar("routing_region", default=None)


class Region:
    """One run, first or repeated, of a checkpointed function; the runs of one call share the list of choices."""

    def __init__(self, choices: list[Any], replay: bool) -> None:
        self.choices, self.replay, self.position = choices, replay, 0
        self._tokens: list[Token] = []

    def __enter__(self) -> None:
        self.position = 0
        self._tokens.append(current.set(self))

    def __exit__(self, *_: object) -> None:
        current.reset(self._tokens.pop())

    def known(self) -> Any:
        """In a recompute the forward's next choice; else None, and it is to be put among the `choices`."""
        if not self.replay:
            return None
        self.position += 1
        return self.choices[self.position - 1]


def keep_routing() -> tuple[Region, Region]:
    """(forward context, recompute context) for one call of `torch.utils.checkpoint.checkpoint`."""
    choices: list[Any] = []
    return Region(choices, replay=False), Region(choices, replay=True)


def kept(decide: Callable[[], Decision]) -> Decision:
    """`decide()`; in a recompute what it returned in the forward, without calling it again."""
    region = current.get()
    known = None if region is None else region.known()
    if known is None:
        known = decide()
        if region is not None:
            region.choices.append(known)
    return known
