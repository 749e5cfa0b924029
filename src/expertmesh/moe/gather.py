"""All tokens to all ranks, and sums of what their experts made of them back: for few ranks that lie near each other.

    all-gather tokens, ids and weights → this rank's experts → reduce-scatter of the partial sums

Tokens are on their way before the router has chosen, if the block around the experts starts the exchange. With 2 ranks
this moves as many rows as sending each token once to every rank that needs it, with 4 hardly more; and nothing about
the routing has to be known on the host: shapes follow from how many tokens each rank has, which the hosts tell each
other once per forward, so the CPU never waits for a device. The experts skip pairs whose ids are not theirs. The
backward mirrors the forward: a reduce-scatter where that gathers, and the reverse. Rows travel by links.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from expertmesh.kernels.grouping import combine
from expertmesh.kernels.recompute import kept
from expertmesh.moe.experts import Exchange, Gradients, Outputs
from expertmesh.moe.links import Mailboxes, Sent, join_side_stream, link_of, on_side_stream
from expertmesh.records import current
from expertmesh.waiting import hosts, waiting


class Gather(Exchange):
    """One call's `Exchange`. M = R · `rows`: every rank pads its tokens to those of the rank that has most."""

    ep_implementation = "expertmesh-gather"

    def __init__(self, layer: Any, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.waits = layer, layer.waits
        self._link, self._num_tokens = link_of(layer.group, layer.waits.place), len(x_TH)
        self._rows = kept(lambda: most_tokens(len(x_TH), layer.group, layer.waits.place))
        self._sent: Sent | None = None
        if ahead and isinstance(self._link, Mailboxes):  # a collective would take multiprocessors from the router
            self._sent = self._link.send_ahead(_padded(x_TH.detach(), self._rows))

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer, sent, self._sent = self.layer, self._sent, None  # this lives until the backward
        parts = [x_TH, ids_TK, weight_TK]
        if self._num_tokens < self._rows:
            nobody = layer.num_ranks * layer.num_local_experts
            parts = [_padded(x_TH, self._rows), _padded(ids_TK, self._rows, nobody), _padded(weight_TK, self._rows)]
        x_MH, ids_MK, weight_MK = self._link.all_gather(parts, sent)
        # this rank's experts become 0, 1, …; all others', and the padding, something else
        return x_MH, ids_MK.sub_(layer.rank * layer.num_local_experts), weight_MK

    def rows_to_keep(self, num_rows: int, block: int) -> int:
        """This rank's share and a quarter, in whole blocks: the host cannot know how many its experts get."""
        block = max(block, 1)
        return max(1, -(-num_rows * 5 // (4 * self.layer.num_ranks * block))) * block

    def combine(self, made: Outputs, residual: torch.Tensor | None) -> torch.Tensor:
        self._made_here = made.position_MK is not None
        residual_TH = None if residual is None else residual.reshape(-1, made.y.shape[1])
        if self._made_here and isinstance(self._link, Mailboxes):
            out_TH = self._link.combine_scatter(made, residual_TH)
        else:
            sums_MH = made.y if made.position_MK is None else combine(made.y, made.position_MK, made.weight_MK)
            (out_TH,) = self._link.reduce_scatter([sums_MH])
            if residual_TH is not None:
                out_TH[: self._num_tokens] += residual_TH
        if self._num_tokens < self._rows:
            out_TH = out_TH[: self._num_tokens].clone()  # no view, of which FSDP warns
        return out_TH if residual is None else torch.ops.aten._unsafe_view(out_TH, residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        if self._num_tokens < self._rows:
            dout_TH = _padded(dout_TH, self._rows)
        return self._link.all_gather([dout_TH], copy=not self._made_here)[0]

    def dispatch_backward(self, dx_MH: torch.Tensor | None, dweight_MK: torch.Tensor | None) -> Callable[[], Gradients]:
        parts = [part for part in (dx_MH, dweight_MK) if part is not None]
        sums: list[torch.Tensor] = []
        if parts:
            with on_side_stream(parts[0].device):  # beside the gradient of weights that is launched next
                sums = self._link.reduce_scatter(parts)

        def wait() -> Gradients:
            if parts:
                join_side_stream(parts[0].device, sums)
            left = iter(sums if self._num_tokens == self._rows else [x[: self._num_tokens].clone() for x in sums])
            return None if dx_MH is None else next(left), None if dweight_MK is None else next(left)

        return wait


def most_tokens(num_tokens: int, group: dist.ProcessGroup, place: str) -> int:
    """The largest number of tokens that any rank of the group has, at least 1; the hosts ask each other.

    In one call of a model only the first layer asks: every layer gets the same number of tokens.
    """
    call = current.get()
    if call is not None and group in call.agreed:
        before, most = call.agreed[group]
        if before != num_tokens:
            raise RuntimeError(
                f"dispatch='gather' needs as many tokens in every layer of a forward, but here {before} became "
                f"{num_tokens}. Use dispatch='all_to_all' with this model."
            )
        return most
    answer = torch.tensor([max(num_tokens, 1)])
    with waiting(place, hosts(group)):
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=hosts(group))
    most = int(answer)
    if call is not None:
        call.agreed[group] = num_tokens, most
    return most


def _padded(x: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    """x [T, …] with rows of `value` behind, up to `rows`."""
    if len(x) == rows:
        return x
    out = x.new_full((rows, *x.shape[1:]), value)
    out[: len(x)] = x
    return out
