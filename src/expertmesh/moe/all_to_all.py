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
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from expertmesh.kernels.combine import combine
from expertmesh.moe.replay import kept
from expertmesh.moe.routes import Routes, owners_rows, routes_of
from expertmesh.waiting import waiting

NAME = "expertmesh"
Splits = list[int] | None


@dataclass(frozen=True)
class _Journey:
    """What one forward decides, and its backward and recompute repeat: routes, and rows to and from each rank."""

    ids_TK: torch.Tensor
    routes: Routes
    send: list[int]
    recv: list[int]


class AllToAll(EPImplementation):
    """The experts of one layer, spread over the ranks of `ep_mesh`.

    The ranks of a tensor-parallel group hold the same tokens: each sends a slice of them, and the results are gathered
    back over `tp_mesh`. All state lives in the call: two models in one process cannot mix.
    """

    num_local_experts: Any

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.layer = getattr(experts, "full_name", "some experts")  # as `lean_layout` has noted it

    @torch.compiler.disable
    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Output [T, H] for hidden_states [T, H], global expert ids [T, K] and routing weights [T, K]; T may be 0."""
        if self.tp_mesh.size() == 1:
            return self._run(hidden_states, top_k_index, top_k_weights)
        mine = (_my_rows(x, self.tp_mesh) for x in (hidden_states, top_k_index, top_k_weights))
        return _all_rows(self._run(*mine), self.tp_mesh, hidden_states.shape)

    def _run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        experts_per_rank = self.num_local_experts
        packed: list[torch.Tensor] = []

        def decide() -> _Journey:
            routes = routes_of(ids_TK, self.ep_mesh.size(), experts_per_rank)
            counts = _Counts(routes.count_R, self._exchange)
            packed.extend(_pack(x_TH, weight_TK, routes, experts_per_rank))  # the device's work while counts travel
            send, recv = counts.wait()
            return _Journey(ids_TK, routes.first(sum(send)), send, recv)

        journey = kept(decide)
        if not packed:  # a recompute: nothing was decided anew
            packed.extend(_pack(x_TH, weight_TK, journey.routes, experts_per_rank))
        x_MH, weight_MK, ids_MK = _Dispatch.apply(x_TH, weight_TK, *packed, journey, self._exchange, experts_per_rank)
        y_MH = self.experts_forward(x_MH, ids_MK, weight_MK)
        return _Combine.apply(y_MH, journey, self._exchange)

    def _exchange(self, to: torch.Tensor, rows: torch.Tensor, recv: Splits = None, send: Splits = None) -> None:
        group = self.ep_mesh.get_group()
        with waiting(self.layer, group):
            dist.all_to_all_single(to, rows, recv, send, group)


class _Counts:
    """The all-to-all of row counts: under way once made, on the host after `wait`."""

    def __init__(self, count_R: torch.Tensor, exchange: Callable) -> None:
        both = torch.stack([count_R, torch.zeros_like(count_R)])
        exchange(both[1], both[0])
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


class _Dispatch(torch.autograd.Function):
    """x [T, H] and weights [T, K] → what this rank's experts get: rows [M, H], weights and local ids [M, K].

    M is at least 1, so that experts never run on nothing: without any row, one of zeros that has no expert here.
    """

    @staticmethod
    def forward(ctx: Any, x_TH, weight_TK, x_NH, meta_NK2, journey: _Journey, exchange, experts_per_rank: int):
        ctx.journey, ctx.exchange = journey, exchange
        ctx.experts_per_rank, ctx.weight_dtype = experts_per_rank, weight_TK.dtype
        num_sent, num_rows, top_k = sum(journey.send), sum(journey.recv), weight_TK.shape[1]
        x_MH = _room_for(num_rows, x_NH)
        meta_MK2 = _room_for(num_rows, meta_NK2)
        if num_rows == 0:
            meta_MK2[:, :top_k] = experts_per_rank
        exchange(meta_MK2[:num_rows], meta_NK2[:num_sent], journey.recv, journey.send)
        exchange(x_MH[:num_rows], x_NH[:num_sent], journey.recv, journey.send)
        ids_MK = meta_MK2[:, :top_k].long()
        ctx.mark_non_differentiable(ids_MK)
        return x_MH, meta_MK2[:, top_k:].contiguous().view(torch.float32), ids_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH, dweight_MK, _):
        journey, dx_TH, dweight_TK = ctx.journey, None, None
        if ctx.needs_input_grad[1]:
            dweight_NK = _back(dweight_MK, journey, ctx.exchange)
            row_TK = owners_rows(journey.routes, journey.ids_TK, ctx.experts_per_rank)
            dweight_TK = dweight_NK.gather(0, row_TK).to(ctx.weight_dtype)
        if ctx.needs_input_grad[0]:
            dx_TH = combine(_back(dx_MH, journey, ctx.exchange), journey.routes.position_TR)
        return dx_TH, dweight_TK, None, None, None, None, None


class _Combine(torch.autograd.Function):
    """The experts' rows [M, H] → every token's sum over the ranks that it went to [T, H]."""

    @staticmethod
    def forward(ctx: Any, y_MH, journey: _Journey, exchange: Callable):
        ctx.journey, ctx.exchange = journey, exchange
        return combine(_back(y_MH, journey, exchange), journey.routes.position_TR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH):
        journey = ctx.journey
        num_rows = sum(journey.recv)
        dy_NH = dout_TH[journey.routes.token_N]
        dy_MH = _room_for(num_rows, dy_NH)
        ctx.exchange(dy_MH[:num_rows], dy_NH, journey.recv, journey.send)
        return dy_MH, None, None


def _room_for(num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised rows as wide as those of `like`; without any, a single one of zeros."""
    return like.new_empty(num_rows, like.shape[1]) if num_rows else like.new_zeros(1, like.shape[1])


def _back(rows_MH: torch.Tensor, journey: _Journey, exchange: Callable) -> torch.Tensor:
    """Rows at the experts' ranks → rows at their tokens' ranks [N, H]."""
    rows_NH = rows_MH.new_empty(sum(journey.send), rows_MH.shape[1])
    exchange(rows_NH, rows_MH[: sum(journey.recv)].contiguous(), journey.send, journey.recv)
    return rows_NH


def _my_rows(x: torch.Tensor, tp_mesh: Any) -> torch.Tensor:
    """This rank's slice of tokens that the whole group holds; backward gathers the slices' gradients."""
    whole = DTensor.from_local(x, tp_mesh, [Replicate()], run_check=False)
    return whole.redistribute(tp_mesh, [Shard(0)]).to_local()


def _all_rows(x: torch.Tensor, tp_mesh: Any, shape: torch.Size) -> torch.Tensor:
    """The slices of all ranks of the group, in order; uneven and empty ones too."""
    x = x.contiguous()
    return DTensor.from_local(x, tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()


EPImplementationInterface.register(NAME, AllToAll)
