"""Which row goes to which rank: the index arithmetic of a dispatch, without any communication.

R ranks hold E experts, rank r the experts r·E/R … (r+1)·E/R - 1. A token goes once to every rank that holds at least
one of its K experts. The rows it becomes are ordered by destination rank, then by token. Everything stays on the
device: the number of rows is known there only, so arrays have the largest possible length, T·min(R, K), and whoever
has learned the true number cuts them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routes:
    """Where the T tokens of one rank go. N rows at most, the first Σ count_R are real.

    token_N: the token of each row, int64. position_TR: the row of token t for rank r, -1 if r has none of its experts,
    int32. ids_NK: expert ids as the destination numbers its own, E/R ("not mine") for pairs of other ranks, int32.
    count_R: rows for each rank, int64.
    """

    token_N: torch.Tensor
    position_TR: torch.Tensor
    ids_NK: torch.Tensor
    count_R: torch.Tensor

    def first(self, num_rows: int) -> "Routes":
        """The same with the arrays cut to the real rows."""
        return Routes(self.token_N[:num_rows], self.position_TR, self.ids_NK[:num_rows], self.count_R)


def routes_of(ids_TK: torch.Tensor, num_ranks: int, experts_per_rank: int) -> Routes:
    """The `Routes` of tokens that chose the global experts ids_TK [T, K]."""
    num_tokens, top_k = ids_TK.shape
    device = ids_TK.device
    owner_TK = ids_TK // experts_per_rank
    ranks = torch.arange(num_ranks, device=device)
    sent_RT = (owner_TK[None] == ranks[:, None, None]).any(-1)
    end_RT = sent_RT.view(-1).cumsum(0)  # how many rows end here or before, in the order of the rows
    position_RT = torch.where(sent_RT, end_RT.view(sent_RT.shape) - 1, -1)
    # row n is the first place where n + 1 rows have ended; behind the real rows this is R·T, a rank that nobody is
    row_N = torch.arange(1, num_tokens * min(num_ranks, top_k) + 1, device=device)
    place_N = torch.searchsorted(end_RT, row_N)
    rank_N, token_N = place_N // max(num_tokens, 1), place_N % max(num_tokens, 1)
    mine_NK = owner_TK[token_N] == rank_N[:, None]
    ids_NK = torch.where(mine_NK, ids_TK[token_N] - rank_N[:, None] * experts_per_rank, experts_per_rank)
    return Routes(token_N, position_RT.t().contiguous().to(torch.int32), ids_NK.to(torch.int32), sent_RT.sum(1))


def routes_of_reference(ids_TK: torch.Tensor, num_ranks: int, experts_per_rank: int) -> Routes:
    """The specification of `routes_of`, as loops; its arrays hold the real rows only."""
    num_tokens, top_k = ids_TK.shape
    tokens: list[int] = []
    rows: list[list[int]] = []
    position_TR = torch.full((num_tokens, num_ranks), -1, dtype=torch.int32)
    count_R = torch.zeros(num_ranks, dtype=torch.int64)
    for rank in range(num_ranks):
        for token, ids in enumerate(ids_TK.tolist()):
            local = [i - rank * experts_per_rank if i // experts_per_rank == rank else experts_per_rank for i in ids]
            if min(local) < experts_per_rank:
                position_TR[token, rank] = len(tokens)
                count_R[rank] += 1
                tokens.append(token)
                rows.append(local)
    ids_NK = torch.tensor(rows, dtype=torch.int32).view(-1, top_k)
    return Routes(torch.tensor(tokens, dtype=torch.int64), position_TR, ids_NK, count_R)


def owners_rows(routes: Routes, ids_TK: torch.Tensor, experts_per_rank: int) -> torch.Tensor:
    """row_TK: the row that carries the pair (t, k), int64: its token's row at the rank that holds the expert."""
    return routes.position_TR.long().gather(1, ids_TK.long() // experts_per_rank)
