"""What a layer's experts ask of a transport, by which tokens reach experts on other ranks and their sums come back.

To add one, write a subclass of `Exchange` in a file of its own, as all_to_all.py and gather.py are, and name it in
`TRANSPORTS` (experts.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from expertmesh.kernels.grouping import combine

Maybe = torch.Tensor | None
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [M, H], ids and weights [M, K]
Gradients = tuple[Maybe, Maybe]  # of x [T, H] and of routing weights [T, K]


class Exchange:
    """The exchanges of one call of a layer, which know what its backward repeats. This one: of experts all here.

    A transport's is made with the `Dispatch` that is called, the x [T, H], and whether this may leave `ahead`, as its
    router has not chosen yet. All ranks call the same methods in the same order; in a backward `combine_backward`, then
    `dispatch_backward`. They, and what the last one returns, are called within `waits`, which limits how long exchanges
    over `layer.group` wait; one over another group stands within `step_timeout(layer.waits.place, that_group)`.
    """

    ep_implementation: str  # the transport's name in Transformers
    rows_here: int | None = None  # how many of the dispatched pairs this rank computes, at least 1, if the host knows
    sharers: int = 1  # else, how many ranks share them: h has room for this one's share and a quarter, if not all
    layer: Any = None
    waits: Any = nullcontext()

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        """What comes to this rank's experts, M at least 1. Ids outside 0, 1, … of this rank are not computed here."""
        return x_TH, ids_TK, weight_TK

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """The sums of what all ranks made [T, H], by `combine` of grouping.py; with a residual of this dtype added, in
        its shape and no view.
        """
        return combine(y_SH, position_MK, weight_MK, residual)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        """The gradient [M, H] of this rank's sums, which the next exchange may overwrite."""
        return dout_TH.contiguous()

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Callable[[], Gradients]:
        """Begins to bring back the gradients that are needed; the result waits for them: dx [T, H], dweight [T, K].
        Gradients of weights are launched in between, so an exchange that the host waits for belongs into the result.
        """
        return lambda: (dx_MH, dweight_MK)


LOCAL = Exchange()
