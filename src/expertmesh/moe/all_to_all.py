"""Expert parallelism with torch.distributed's all-to-all. It runs on gloo and NCCL, on one node or many.

    routes → pack → all-to-all → this rank's experts → all-to-all back → sum

A token is sent once to each rank that holds at least one of its experts, with its routing weights and local expert ids.
That rank weights and sums the outputs of its experts and returns one row per (token, rank). The token's rank adds these
rows. The backward does the same in reverse, with the split sizes of the forward. The host waits for the device once per
layer, for the split sizes, and never in the backward or in a recompute.

Each of R ranks holds E/R consecutive experts. The N rows to send are ordered by rank, then by token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from expertmesh.kernels.grouping import combine
from expertmesh.kernels.recompute import replayed
from expertmesh.moe.exchange import Exchange, Gradients, Maybe, Rows


class AllToAll(Exchange):
    """The all-to-all `Exchange`. If a rank receives no rows, its experts get one row of zeros."""

    ep_implementation = "expertmesh"

    def __init__(self, layer: Any, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.timeout = layer, layer.timeout

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> Rows:
        packed: list[torch.Tensor] = []
        num_experts, top_k = self.layer.num_local_experts, weight_TK.shape[1]

        def decide() -> tuple[torch.Tensor, Routes, list[int], list[int], int]:
            routes = routes_of(ids_TK, self.layer.num_ranks, num_experts)
            splits = torch.stack([routes.counts_R2, torch.zeros_like(routes.counts_R2)])  # to each rank, from each rank
            dist.all_to_all_single(splits[1], splits[0], group=self.layer.group)
            if splits.is_cuda:
                on_device, copied = splits, torch.cuda.Event()
                splits = torch.empty(splits.shape, dtype=splits.dtype, pin_memory=True)
                splits.copy_(on_device, non_blocking=True)
                copied.record()
                packed.extend(self._pack(x_TH, weight_TK, routes))  # overlaps the copy to the host
                copied.synchronize()
            (send, _), (recv, pairs) = splits.transpose(1, 2).tolist()
            real = slice(sum(send))  # the rows after them are padding
            routes = routes._replace(token_N=routes.token_N[real], ids_NK=routes.ids_NK[real])
            return ids_TK, routes, send, recv, max(1, sum(pairs))

        # the backward and a recompute reuse these
        self._ids_TK, self._routes, self._send, self._recv, self.num_local_rows = replayed(decide)
        self._weight_dtype = weight_TK.dtype
        x_NH, meta_NK2 = packed or self._pack(x_TH, weight_TK, self._routes)
        meta_MK2, x_MH = self._exchange(self._send, self._recv, meta_NK2, x_NH)
        if not sum(self._recv):
            meta_MK2[:, :top_k] = num_experts  # the row of zeros belongs to no local expert
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
        """Return rows [N, H] and their metadata [N, 2K] int32: expert ids, then the bits of the float32 weights."""
        is_local_NK = routes.ids_NK < self.layer.num_local_experts
        weight_NK = torch.where(is_local_NK, weight_TK[routes.token_N].float(), 0)
        return x_TH[routes.token_N], torch.cat([routes.ids_NK, weight_NK.view(torch.int32)], dim=1)

    def _exchange(self, send: list[int], recv: list[int], *tables: torch.Tensor) -> list[torch.Tensor]:
        """Exchange the first sum(send) rows of each table. Return the rows received, or one row of zeros if none."""
        num_rows, outs = sum(recv), []
        for rows in tables:
            outs.append(rows.new_empty(num_rows, rows.shape[1]) if num_rows else rows.new_zeros(1, rows.shape[1]))
            dist.all_to_all_single(outs[-1][:num_rows], rows[: sum(send)].contiguous(), recv, send, self.layer.group)
        return outs


class Routes(NamedTuple):
    """The rows that one rank sends for its T tokens: one per token and rank that holds at least one of its K experts.

    token_N: the token of each row, int64. position_TR: the row of token t for rank r, or -1 if r holds none of its
    experts, int32. ids_NK: expert ids local to the destination, or E/R for experts of other ranks, int32. counts_R2:
    for each destination rank the number of rows and of (token, expert) pairs in them, int64.
    """

    token_N: torch.Tensor
    position_TR: torch.Tensor
    ids_NK: torch.Tensor
    counts_R2: torch.Tensor


def routes_of(ids_TK: torch.Tensor, num_ranks: int, experts_per_rank: int) -> Routes:
    """Return the `Routes` of tokens with global expert ids ids_TK [T, K]. N is the upper bound T·min(R, K), as only the
    device knows the number of rows. The caller removes the padding rows at the end once the host knows it.
    """
    num_tokens, top_k = ids_TK.shape
    device = ids_TK.device
    owner_TK = ids_TK // experts_per_rank
    ranks = torch.arange(num_ranks, device=device)
    pairs_RT = (owner_TK[None] == ranks[:, None, None]).sum(-1)
    sent_RT = pairs_RT > 0
    end_RT = sent_RT.view(-1).cumsum(0)  # number of rows up to and including each (rank, token)
    position_RT = torch.where(sent_RT, end_RT.view(sent_RT.shape) - 1, -1)
    # row n is at the first (rank, token) where the count reaches n + 1; padding rows get R·T, an invalid rank
    row_N = torch.arange(1, num_tokens * min(num_ranks, top_k) + 1, device=device)
    flat_N = torch.searchsorted(end_RT, row_N)
    rank_N, token_N = flat_N // max(num_tokens, 1), flat_N % max(num_tokens, 1)
    is_local_NK = owner_TK[token_N] == rank_N[:, None]
    ids_NK = torch.where(is_local_NK, ids_TK[token_N] - rank_N[:, None] * experts_per_rank, experts_per_rank)
    counts_R2 = torch.stack([sent_RT.sum(1), pairs_RT.sum(1)], dim=1)
    return Routes(token_N, position_RT.t().contiguous().to(torch.int32), ids_NK.to(torch.int32), counts_R2)
