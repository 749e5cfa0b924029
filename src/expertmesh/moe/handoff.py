"""What a dispatch and the experts that it calls do together: sums leave before all are made, gradients before others.

A dispatch offers a `Handoff` around its call of the experts. Experts that adopt it `send` their rows: the sums for
other ranks' tokens are written where these read them. In the backward they call `start` with their input gradients,
before their last weight gradient, which hides the way back; the dispatch's own backward, which autograd runs next, asks
`finish` for what came back.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from expertmesh.kernels.combine import combine
from expertmesh.moe.links import Link, Mailboxes, beside, join


class Handoff:
    """One call of the experts. adopted: they send their sums and start the way back themselves, and then read the
    gradient of their output no more. ranks: how many share the experts. residual: [T, H], added to this rank's sums.
    """

    def __init__(self, link: Link, ranks: int, residual: torch.Tensor | None = None) -> None:
        self.link, self.ranks, self.residual, self.adopted = link, ranks, residual, False
        self._summed: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._before: Callable[[], Any] = lambda: None

    def rows_to_keep(self, num_rows: int, block: int) -> int:
        """For how many of the rows [S] that its experts might get a rank makes room until the backward: its share and a
        quarter, in whole blocks. The host cannot know how many they are; what has no room is computed again.
        """
        block = max(block, 1)
        return max(1, -(-num_rows * 5 // (4 * self.ranks * block))) * block

    def send(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
        """Combine the experts' rows y [S, H] and add up what all ranks made; `summed` has the result. What it returns
        has the shape of the experts' output [M, H], for autograd, and no values.
        """
        if isinstance(self.link, Mailboxes):
            self._summed = self.link.combine_scatter(y_SH, position_MK, weight_MK, self.residual)
        else:
            self._summed = self._sum(combine(y_SH, position_MK, weight_MK))
        return y_SH.new_empty_strided((len(position_MK), y_SH.shape[1]), (0, 0))

    def summed(self, y_MH: torch.Tensor) -> torch.Tensor:
        """This rank's rows [M / R, H] of what the experts returned, summed over all ranks, with the residual."""
        sums = self._sum(y_MH) if self._summed is None else self._summed
        self._summed = self.residual = None  # this lives until the backward
        return sums

    def _sum(self, y_MH: torch.Tensor) -> torch.Tensor:
        (sums,) = self.link.reduce_scatter([y_MH])
        if self.residual is not None:
            sums[: len(self.residual)] += self.residual
        return sums

    def remember(self, ctx: Any, like: torch.Tensor) -> None:
        """Of the function before the experts, for `recompute`: it saves an empty tensor."""
        ctx.save_for_backward(like.new_empty(0))
        self._before = weakref.ref(ctx)  # the graph holds it; it holds this

    def recompute(self) -> None:
        """Let a checkpointed region run again now, if this is in one, not when the experts ask for what they saved:
        it repeats exchanges, which must not come between one and its reader.
        """
        ctx = self._before()
        if ctx is not None and self.adopted:
            _ = ctx.saved_tensors

    def start(self, parts: list[torch.Tensor]) -> None:
        """Begin the reduce-scatter of these; on a GPU beside what is launched next."""
        self._parts = parts
        with beside(parts[0].device):
            self._sums = self.link.reduce_scatter(parts)

    def finish(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sums of `parts`: those under way if they are the same tensors, else made now."""
        started, sums, self._parts, self._sums = self._parts, self._sums, [], []
        if started and parts[0].is_cuda:
            join(parts[0].device)
            for tensor in sums:
                tensor.record_stream(torch.cuda.current_stream())
        if [part.data_ptr() for part in started] == [part.data_ptr() for part in parts]:
            return sums
        return self.link.reduce_scatter(parts)


_offered: ContextVar[Handoff | None] = ContextVar("handoff", default=None)


@contextmanager
def offered(handoff: Handoff) -> Iterator[None]:
    """Within: the experts may adopt it."""
    token = _offered.set(handoff)
    try:
        yield
    finally:
        _offered.reset(token)


def adopt() -> Handoff | None:
    """The handoff on offer, now adopted, or None."""
    handoff = _offered.get()
    if handoff is not None:
        handoff.adopted = True
    return handoff
