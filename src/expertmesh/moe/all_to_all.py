"""Tokens to experts and back with torch.distributed's all-to-all: runs anywhere, gloo or NCCL, one node or many.

    routes → pack → exchange → this rank's experts → exchange back → sum

A token travels once to each rank that holds some of its experts, with its routing weights and that rank's expert ids.
There the experts weight and sum their outputs, and one row per (token, rank) comes back; its owner adds up what its
ranks sent. The backward is the same road reversed, with the splits of the forward: the host waits once per layer, for
the counts, and not at all in backward or in a recompute.

R ranks hold E experts, each E/R in a row. The N rows that tokens become are ordered by rank, then by token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.kernels.grouping import combine
from expertmesh.kernels.recompute import replayed
from expertmesh.moe.exchange import Exchange, Gradients, Maybe, Rows


class AllToAll(Exchange):
    """One call's `Exchange`. Where this rank gets no row at all, its experts get one of zeros."""

    ep_implementation = "expertmesh"

    def __init__(self, layer: Any, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.waits = layer, layer.waits

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        packed: list[torch.Tensor] = []
        num_experts, top_k = self.layer.num_local_experts, weight_TK.shape[1]

        def decide() -> tuple[torch.Tensor, Routes, list[int], list[int], int]:
            routes = routes_of(ids_TK, self.layer.num_ranks, num_experts)
            both = torch.stack([routes.counts_R2, torch.zeros_like(routes.counts_R2)])  # to each rank, from each rank
            dist.all_to_all_single(both[1], both[0], group=self.layer.group)
            if both.is_cuda:
                on_device, arrived = both, torch.cuda.Event()
                both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
                both.copy_(on_device, non_blocking=True)
                arrived.record()
                packed.extend(self._pack(x_TH, weight_TK, routes))  # the device's work while counts travel
                arrived.synchronize()
            (send, _), (recv, pairs) = both.transpose(1, 2).tolist()
            sent = slice(sum(send))  # behind them are no real rows
            routes = routes._replace(token_N=routes.token_N[sent], ids_NK=routes.ids_NK[sent])
            return ids_TK, routes, send, recv, max(1, sum(pairs))

        # what the backward and a recompute repeat
        self._ids_TK, self._routes, self._send, self._recv, self.rows_here = replayed(decide)
        self._weight_dtype = weight_TK.dtype
        x_NH, meta_NK2 = packed or self._pack(x_TH, weight_TK, self._routes)
        meta_MK2, x_MH = self._exchange(self._send, self._recv, meta_NK2, x_NH)
        if not sum(self._recv):
            meta_MK2[:, :top_k] = num_experts  # the row of zeros has no expert here
        return x_MH, meta_MK2[:, :top_k].long(), meta_MK2[:, top_k:].contiguous().view(torch.float32)

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        (back_NH,) = self._exchange(self._recv, self._send, combine(y_SH, position_MK, weight_MK))
        out_TH = combine(back_NH, self._routes.position_TR)
        return out_TH if residual is None else residual + out_TH.view(residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        return self._exchange(self._send, self._recv, dout_TH[self._routes.token_N])[0]

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Callable[[], Gradients]:
        def exchange() -> Gradients:
            dx_TH = dweight_TK = None
            needed = [grad for grad in (dweight_MK, dx_MH) if grad is not None]
            back = iter(self._exchange(self._recv, self._send, *needed))
            if dweight_MK is not None:
                owner_TK = (self._ids_TK // self.layer.num_local_experts).long()
                row_TK = self._routes.position_TR.long().gather(1, owner_TK)
                dweight_TK = next(back).gather(0, row_TK).to(self._weight_dtype)
            if dx_MH is not None:
                dx_TH = combine(next(back), self._routes.position_TR)
            return dx_TH, dweight_TK

        return exchange

    def _pack(self, x_TH: torch.Tensor, weight_TK: torch.Tensor, routes: "Routes") -> tuple[torch.Tensor, torch.Tensor]:
        """The two messages: rows [N, H], and [N, 2K] int32 of their ids and the bits of their float32 weights."""
        mine_NK = routes.ids_NK < self.layer.num_local_experts
        weight_NK = torch.where(mine_NK, weight_TK[routes.token_N].float(), 0)
        return x_TH[routes.token_N], torch.cat([routes.ids_NK, weight_NK.view(torch.int32)], dim=1)

    def _exchange(self, send: list[int], recv: list[int], *tables: torch.Tensor) -> list[torch.Tensor]:
        """For each table what comes from the ranks, to which its first rows go; if nothing comes, one row of zeros."""
        num_rows, came = sum(recv), []
        for rows in tables:
            came.append(rows.new_empty(num_rows, rows.shape[1]) if num_rows else rows.new_zeros(1, rows.shape[1]))
            dist.all_to_all_single(came[-1][:num_rows], rows[: sum(send)].contiguous(), recv, send, self.layer.group)
        return came


class Routes(NamedTuple):
    """Where the T tokens of one rank go: once to every rank that holds at least one of their K experts.

    token_N: the token of each row, int64. position_TR: the row of token t for rank r, -1 if r has none of its experts,
    int32. ids_NK: expert ids as the destination numbers its own, E/R ("not mine") for pairs of other ranks, int32.
    counts_R2: rows for each rank, and pairs of a token and an expert in them, int64.
    """

    token_N: torch.Tensor
    position_TR: torch.Tensor
    ids_NK: torch.Tensor
    counts_R2: torch.Tensor


def routes_of(ids_TK: torch.Tensor, num_ranks: int, experts_per_rank: int) -> Routes:
    """The `Routes` of tokens that chose the global experts ids_TK [T, K].

    Only the device knows how many rows there are. So here N = T·min(R, K), the most there can be, and who has learned
    the true number cuts the rows behind it.
    """
    num_tokens, top_k = ids_TK.shape
    device = ids_TK.device
    owner_TK = ids_TK // experts_per_rank
    ranks = torch.arange(num_ranks, device=device)
    pairs_RT = (owner_TK[None] == ranks[:, None, None]).sum(-1)
    sent_RT = pairs_RT > 0
    end_RT = sent_RT.view(-1).cumsum(0)  # how many rows end here or before, in the order of the rows
    position_RT = torch.where(sent_RT, end_RT.view(sent_RT.shape) - 1, -1)
    # row n is the first place where n + 1 rows have ended; behind the real rows this is R·T, a rank that nobody is
    row_N = torch.arange(1, num_tokens * min(num_ranks, top_k) + 1, device=device)
    place_N = torch.searchsorted(end_RT, row_N)
    rank_N, token_N = place_N // max(num_tokens, 1), place_N % max(num_tokens, 1)
    mine_NK = owner_TK[token_N] == rank_N[:, None]
    ids_NK = torch.where(mine_NK, ids_TK[token_N] - rank_N[:, None] * experts_per_rank, experts_per_rank)
    counts_R2 = torch.stack([sent_RT.sum(1), pairs_RT.sum(1)], dim=1)
    return Routes(token_N, position_RT.t().contiguous().to(torch.int32), ids_NK.to(torch.int32), counts_R2)
