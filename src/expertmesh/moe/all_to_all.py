"""Tokens to experts and back with torch.distributed's all-to-all: runs anywhere, gloo or NCCL, one node or many.

    routes → pack → exchange → this rank's experts → exchange back → sum

A token travels once to each rank that holds some of its experts, with its routing weights and that rank's expert ids.
There the experts weight and sum their outputs, and one row per (token, rank) comes back; its owner adds up what its
ranks sent. The backward is the same road reversed: gather and sum change places, and the splits are those of the
forward, so the host waits exactly once per layer, for the counts, and not at all in backward or in a recompute.

Registered in Transformers as the `ep_implementation` "expertmesh".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh.kernels.combine import combine
from expertmesh.moe.dispatch import Dispatch
from expertmesh.moe.exchange import Exchange, Gradients, Outputs
from expertmesh.moe.replay import kept
from expertmesh.moe.routes import Routes, owners_rows, routes_of
from expertmesh.waiting import waiting

NAME = "expertmesh"


@dataclass(frozen=True)
class _Plan:
    """What one forward decides, and its backward and recompute repeat: routes, and rows to and from each rank."""

    ids_TK: torch.Tensor
    routes: Routes
    send: list[int]
    recv: list[int]


class AllToAll(Exchange):
    """One call's `Exchange`. M, the rows that this rank gets, is at least 1, so that experts never run on nothing."""

    _plan: _Plan

    def __init__(self, dispatch: Dispatch) -> None:
        self.layer, self.group, self.num_ranks = dispatch.layer, dispatch.group, dispatch.num_ranks
        self.experts_per_rank = dispatch.num_local_experts

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed: list[torch.Tensor] = []

        def decide() -> _Plan:
            routes = routes_of(ids_TK, self.num_ranks, self.experts_per_rank)
            counts = _Counts(routes.count_R, self)
            packed.extend(_pack(x_TH, weight_TK, routes, self.experts_per_rank))  # while the counts travel
            send, recv = counts.wait()
            return _Plan(ids_TK, routes.first(sum(send)), send, recv)

        self._plan = kept(decide)
        self._weight_dtype, top_k = weight_TK.dtype, weight_TK.shape[1]
        # in a recompute nothing was decided anew
        x_NH, meta_NK2 = packed or _pack(x_TH, weight_TK, self._plan.routes, self.experts_per_rank)
        meta_MK2 = self._to_experts(meta_NK2)
        x_MH = self._to_experts(x_NH)
        if not sum(self._plan.recv):
            meta_MK2[:, :top_k] = self.experts_per_rank  # the row of zeros has no expert here
        return x_MH, meta_MK2[:, :top_k].long(), meta_MK2[:, top_k:].contiguous().view(torch.float32)

    def combine(self, made: Outputs, residual: torch.Tensor | None) -> torch.Tensor:
        return combine(self._to_owners(made.sums()), self._plan.routes.position_TR, residual=residual)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        return self._to_experts(dout_TH[self._plan.routes.token_N])

    def dispatch_backward(self, dx_MH: torch.Tensor | None, dweight_MK: torch.Tensor | None) -> Callable[[], Gradients]:
        def exchange() -> Gradients:
            routes, dx_TH, dweight_TK = self._plan.routes, None, None
            if dweight_MK is not None:
                row_TK = owners_rows(routes, self._plan.ids_TK, self.experts_per_rank)
                dweight_TK = self._to_owners(dweight_MK).gather(0, row_TK).to(self._weight_dtype)
            if dx_MH is not None:
                dx_TH = combine(self._to_owners(dx_MH), routes.position_TR)
            return dx_TH, dweight_TK

        return exchange

    def _to_experts(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Rows [N, …] of this rank's tokens → those [M, …] that are for its experts; without any, one row of zeros."""
        send, recv = self._plan.send, self._plan.recv
        num_rows, width = sum(recv), rows_N.shape[1]
        rows_M = rows_N.new_empty(num_rows, width) if num_rows else rows_N.new_zeros(1, width)
        self.exchange(rows_M[:num_rows], rows_N[: sum(send)], recv, send)
        return rows_M

    def _to_owners(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The way back: rows [M, …] → [N, …]."""
        send, recv = self._plan.send, self._plan.recv
        rows_N = rows_M.new_empty(sum(send), rows_M.shape[1])
        self.exchange(rows_N, rows_M[: sum(recv)].contiguous(), send, recv)
        return rows_N

    def exchange(
        self, to: torch.Tensor, rows: torch.Tensor, recv: list[int] | None = None, send: list[int] | None = None
    ) -> None:
        """One all-to-all, of which an error names the layer."""
        with waiting(self.layer, self.group):
            dist.all_to_all_single(to, rows, recv, send, self.group)


class _Counts:
    """The all-to-all of row counts: under way once made, on the host after `wait`."""

    def __init__(self, count_R: torch.Tensor, transport: AllToAll) -> None:
        both = torch.stack([count_R, torch.zeros_like(count_R)])
        transport.exchange(both[1], both[0])
        self._event: torch.cuda.Event | None = None
        self._host = both
        if both.is_cuda:
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[list[int]]:
        """[rows to each rank, rows from each rank]."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


@torch.no_grad()
def _pack(
    x_TH: torch.Tensor, weight_TK: torch.Tensor, routes: Routes, experts_per_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two messages: rows [N, H], and [N, 2K] int32 of their ids and the bits of their float32 weights."""
    weight_NK = torch.where(routes.ids_NK < experts_per_rank, weight_TK[routes.token_N].float(), 0)
    return x_TH[routes.token_N], torch.cat([routes.ids_NK, weight_NK.view(torch.int32)], dim=1)


EPImplementationInterface.register(NAME, partial(Dispatch, AllToAll))
