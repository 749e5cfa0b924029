"""What a layer's experts ask of a transport: rows brought to the ranks that hold their experts, and sums brought back.

    x_TH, ids, weights → dispatch → x_MH → up, down (experts.py) → y_SH → combine → out_TH

T tokens are this rank's own, M rows are those that its experts get. To add a transport, write a subclass of `Exchange`
in a file of its own, as all_to_all.py and gather.py are, and name it in `TRANSPORTS` (dispatch.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from expertmesh.kernels.grouping import combine

Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


class Outputs(NamedTuple):
    """What experts made of their M rows: y [S, H] in the order of the experts, with positions and weights [M, K], of
    which `combine` makes the sums; or these y [M, H] alone.
    """

    y: torch.Tensor
    position_MK: torch.Tensor | None = None
    weight_MK: torch.Tensor | None = None


class Exchange:
    """The exchanges of one call of one layer. It knows what the backward must repeat, and is handed from stage to stage
    as an argument. This one is for experts that are all here.

    All ranks call the same methods in the same order; in a backward `combine_backward`, then `dispatch_backward`. Each
    is called within `waits`, which limits how long exchanges over `layer.group` wait; other groups need their own.
    """

    ep_implementation: str  # the transport's name in Transformers
    rows_here: int | None = None  # how many of the dispatched pairs this rank computes, at least 1, if the host knows

    def __init__(self, layer: Any = None, x_TH: torch.Tensor | None = None, ahead: bool = False) -> None:
        """layer: the `Dispatch` that is called with the tokens x. ahead: its router has not chosen yet, and the tokens
        may leave now.
        """
        self.layer, self.waits = layer, nullcontext() if layer is None else layer.waits

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [M, H], expert ids and routing weights [M, K]; ids outside this rank's 0, 1, … are not computed here. M is
        at least 1, though no rank may have a token.
        """
        return x_TH, ids_TK, weight_TK

    def rows_to_keep(self, num_rows: int, block: int) -> int | None:
        """Asked without `rows_here`: for how many of the rows [S] there is room until the backward; the others are
        computed again. None: all.
        """
        return None

    def combine(self, made: Outputs, residual: torch.Tensor | None) -> torch.Tensor:
        """The sums of what all ranks made [T, H]; with a residual [..., H] of the same dtype, residual + sums, in its
        shape and no view.
        """
        assert made.position_MK is not None
        return combine(made.y, made.position_MK, made.weight_MK, residual)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        """The gradient [M, H] of this rank's sums. If `combine` was given positions, the next exchange may overwrite
        it: all that reads it must have been launched by then.
        """
        return dout_TH.contiguous()

    def dispatch_backward(self, dx_MH: torch.Tensor | None, dweight_MK: torch.Tensor | None) -> Callable[[], Gradients]:
        """Begins to bring the gradients back, those that are needed; what it returns waits for them: (dx [T, H],
        dweight [T, K]).
        """
        return lambda: (dx_MH, dweight_MK)


LOCAL = Exchange()
