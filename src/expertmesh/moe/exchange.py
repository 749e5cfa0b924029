"""The interface of a transport: how an experts layer sends tokens to experts on other ranks and gets the sums back.

To add a transport, write a subclass of `Exchange` in a file of its own, like all_to_all.py and gather.py, and add it to
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
    """The communication of one forward of an experts layer and of its backward. This base class is the local case: all
    experts are on this rank and nothing is sent.

    A transport is constructed with its `Dispatch`, x [T, H], and `ahead`, true if x may be sent before the router.
    All ranks call the same methods in the same order, `combine_backward` before `dispatch_backward`. Callers enter
    `timeout`, for collectives over `layer.group`, around each method and around what `dispatch_backward` returns.
    Collectives over another group need `step_timeout(layer.timeout.place, group)`.
    """

    ep_implementation: str  # the transport's name in Transformers
    num_local_rows: int | None = None  # rows S for this rank's experts, at least 1; None if only the device knows
    sharing_ranks: int = 1  # if num_local_rows is None, h has room for 1.25/sharing_ranks of the M·K rows
    layer: Any = None
    timeout: Any = nullcontext()

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        """Return the M >= 1 rows for this rank's experts. Ids become local; ids outside the local range are skipped."""
        return x_TH, ids_TK, weight_TK

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        """Return the sums [T, H] over all ranks' experts, by `combine` of grouping.py. A residual has the same dtype.
        It is added to the result, which then has its shape and must not be a view.
        """
        return combine(y_SH, position_MK, weight_MK, residual)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        """Return the gradient [M, H] of this rank's sums. It is valid until the next exchange only."""
        return dout_TH.contiguous()

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Callable[[], Gradients]:
        """Start to send the gradients back. Return a callable that waits for (dx [T, H], dweight [T, K]). The caller
        launches weight gradients in between, so an exchange that blocks the host belongs inside the callable.
        """
        return lambda: (dx_MH, dweight_MK)


LOCAL = Exchange()
