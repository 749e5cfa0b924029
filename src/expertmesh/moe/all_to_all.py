"""Tokens to experts and back with torch.distributed's all-to-all: runs anywhere, gloo or NCCL, one node or many.

    routes → pack → exchange → this rank's experts → exchange back → sum

A token travels once to each rank that holds some of its experts, with its routing weights and that rank's expert ids.
There the experts weight and sum their outputs, and one row per (token, rank) comes back; its owner adds up what its
ranks sent. The backward is the same road reversed: gather and sum change places, and the splits are those of the
forward, so the host waits exactly once per layer, for the counts, and not at all in backward or in a recompute.

Registered in Transformers as the `ep_implementation` "expertmesh".
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh.kernels.combine import combine
from expertmesh.moe.dispatch import Dispatch
from expertmesh.moe.exchange import Exchange, Gradients, Outputs
from expertmesh.moe.replay import kept
from expertmesh.moe.routes import Routes, owners_rows, routes_of

NAME = "expertmesh"


class AllToAll(Exchange):
    """One call's `Exchange`. M, the rows that this rank gets, is at least 1, so that experts never run on nothing."""

    def __init__(self, dispatch: Dispatch, _: torch.Tensor) -> None:
        self._waits, self._group, self._num_ranks = dispatch.waits, dispatch.group, dispatch.num_ranks
        self._experts_per_rank: int = dispatch.num_local_experts

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed: list[torch.Tensor] = []

        def decide() -> tuple[torch.Tensor, Routes, list[int], list[int]]:
            routes = routes_of(ids_TK, self._num_ranks, self._experts_per_rank)
            wait = self._counts(routes.count_R)
            packed.extend(self._pack(x_TH, weight_TK, routes))  # the device's work while counts travel
            send, recv = wait()
            return ids_TK, routes.first(sum(send)), send, recv

        # what the backward and a recompute repeat
        self._ids_TK, self._routes, self._send, self._recv = kept(decide)
        self._weight_dtype, top_k = weight_TK.dtype, weight_TK.shape[1]
        x_NH, meta_NK2 = packed or self._pack(x_TH, weight_TK, self._routes)
        meta_MK2 = self._to_experts(meta_NK2)
        x_MH = self._to_experts(x_NH)
        if not sum(self._recv):
            meta_MK2[:, :top_k] = self._experts_per_rank  # the row of zeros has no expert here
        return x_MH, meta_MK2[:, :top_k].long(), meta_MK2[:, top_k:].contiguous().view(torch.float32)

    def combine(self, made: Outputs, residual: torch.Tensor | None) -> torch.Tensor:
        out_TH = combine(self._to_owners(made.sums()), self._routes.position_TR)
        return out_TH if residual is None else residual + out_TH.view(residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        return self._to_experts(dout_TH[self._routes.token_N])

    def dispatch_backward(self, dx_MH: torch.Tensor | None, dweight_MK: torch.Tensor | None) -> Callable[[], Gradients]:
        def exchange() -> Gradients:
            dx_TH = dweight_TK = None
            if dweight_MK is not None:
                row_TK = owners_rows(self._routes, self._ids_TK, self._experts_per_rank)
                dweight_TK = self._to_owners(dweight_MK).gather(0, row_TK).to(self._weight_dtype)
            if dx_MH is not None:
                dx_TH = combine(self._to_owners(dx_MH), self._routes.position_TR)
            return dx_TH, dweight_TK

        return exchange

    def _counts(self, count_R: torch.Tensor) -> Callable[[], list[list[int]]]:
        """Sends how many rows go to each rank; what it returns waits for [rows to each rank, rows from each]."""
        both = torch.stack([count_R, torch.zeros_like(count_R)])
        self._exchange(both[1], both[0])
        if not both.is_cuda:
            return both.tolist
        host, event = torch.empty(both.shape, dtype=both.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(both, non_blocking=True)
        event.record()

        def wait() -> list[list[int]]:
            event.synchronize()
            return host.tolist()

        return wait

    def _pack(self, x_TH: torch.Tensor, weight_TK: torch.Tensor, routes: Routes) -> tuple[torch.Tensor, torch.Tensor]:
        """The two messages: rows [N, H], and [N, 2K] int32 of their ids and the bits of their float32 weights."""
        weight_NK = torch.where(routes.ids_NK < self._experts_per_rank, weight_TK[routes.token_N].float(), 0)
        return x_TH[routes.token_N], torch.cat([routes.ids_NK, weight_NK.view(torch.int32)], dim=1)

    def _to_experts(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Rows [N, …] of this rank's tokens → those [M, …] that are for its experts; without any, one row of zeros."""
        num_rows, width = sum(self._recv), rows_N.shape[1]
        rows_M = rows_N.new_empty(num_rows, width) if num_rows else rows_N.new_zeros(1, width)
        self._exchange(rows_M[:num_rows], rows_N[: sum(self._send)], self._recv, self._send)
        return rows_M

    def _to_owners(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The way back: rows [M, …] → [N, …]."""
        rows_N = rows_M.new_empty(sum(self._send), rows_M.shape[1])
        self._exchange(rows_N, rows_M[: sum(self._recv)].contiguous(), self._send, self._recv)
        return rows_N

    def _exchange(
        self, to: torch.Tensor, rows: torch.Tensor, recv: list[int] | None = None, send: list[int] | None = None
    ) -> None:
        with self._waits:
            dist.all_to_all_single(to, rows, recv, send, self._group)


EPImplementationInterface.register(NAME, partial(Dispatch, AllToAll))
