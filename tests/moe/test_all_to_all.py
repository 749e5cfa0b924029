"""The index arithmetic of an all-to-all equals its loops, and a dispatch played on one process equals none."""

import pytest
import torch

from expertmesh.kernels.grouping import combine
from expertmesh.moe.all_to_all import Routes, routes_of

CASES = {
    "ordinary": (7, 3, 4, 2),
    "one rank": (5, 2, 1, 4),
    "more ranks than choices": (6, 2, 8, 1),
    "more choices than ranks": (6, 5, 2, 4),
    "one token": (1, 1, 2, 2),
    "no token": (0, 2, 2, 2),
}


def loops(ids_TK: torch.Tensor, num_ranks: int, experts_per_rank: int) -> Routes:
    """The specification of `routes_of`; its arrays hold the real rows only."""
    num_tokens, top_k = ids_TK.shape
    tokens: list[int] = []
    rows: list[list[int]] = []
    position_TR = torch.full((num_tokens, num_ranks), -1, dtype=torch.int32)
    counts_R2 = torch.zeros(num_ranks, 2, dtype=torch.int64)
    for rank in range(num_ranks):
        for token, ids in enumerate(ids_TK.tolist()):
            local = [i - rank * experts_per_rank if i // experts_per_rank == rank else experts_per_rank for i in ids]
            if min(local) < experts_per_rank:
                position_TR[token, rank] = len(tokens)
                counts_R2[rank] += torch.tensor([1, sum(i < experts_per_rank for i in local)])
                tokens.append(token)
                rows.append(local)
    ids_NK = torch.tensor(rows, dtype=torch.int32).view(-1, top_k)
    return Routes(torch.tensor(tokens, dtype=torch.int64), position_TR, ids_NK, counts_R2)


def real(routes: Routes) -> Routes:
    sent = slice(int(routes.counts_R2[:, 0].sum()))
    return routes._replace(token_N=routes.token_N[sent], ids_NK=routes.ids_NK[sent])


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_routes_equal_their_loops(sizes):
    num_tokens, top_k, num_ranks, experts_per_rank = sizes
    ids_TK = choices(num_tokens, top_k, num_ranks * experts_per_rank)
    want = loops(ids_TK, num_ranks, experts_per_rank)
    made = routes_of(ids_TK, num_ranks, experts_per_rank)
    got = real(made)
    for name in ("token_N", "position_TR", "ids_NK", "counts_R2"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0)
    # rows behind the real ones point at a token that exists and ask no expert for anything
    assert (made.ids_NK[len(got.ids_NK) :] == experts_per_rank).all()
    assert ((made.token_N >= 0) & (made.token_N < max(num_tokens, 1))).all()


def test_every_pair_is_carried_by_one_row_of_its_own_token():
    ids_TK = choices(9, 3, 8)
    routes = routes_of(ids_TK, 4, 2)
    row_TK = routes.position_TR.long().gather(1, (ids_TK // 2).long())
    assert (routes.token_N[row_TK] == torch.arange(9)[:, None]).all()
    local = routes.ids_NK[row_TK, torch.arange(3)]
    assert (local == ids_TK % 2).all()


@pytest.mark.parametrize("tokens_per_rank", [(6, 3), (5, 0), (4, 4)], ids=str)
@pytest.mark.parametrize("favourite", [None, 0, 3], ids=["spread", "all to expert 0", "all to expert 3"])
def test_a_dispatch_played_on_one_process_computes_every_pair_once(tokens_per_rank, favourite):
    """Ranks are entries of lists here, the exchange moves list entries, each expert multiplies by a matrix."""
    num_ranks, experts_per_rank, top_k, width = 2, 2, 2, 4
    torch.manual_seed(0)
    experts = torch.randn(num_ranks * experts_per_rank, width, width)
    rows = [torch.randn(n, width) for n in tokens_per_rank]
    ids = [choices(n, top_k, 4, seed) for seed, n in enumerate(tokens_per_rank)]
    if favourite is not None:
        ids = [torch.full_like(i, favourite) for i in ids]
    weights = [torch.rand(i.shape) for i in ids]

    routes = [real(routes_of(i, num_ranks, experts_per_rank)) for i in ids]
    partial = [torch.full((len(r.token_N), width), float("nan")) for r in routes]
    for source, (x, w, r) in enumerate(zip(rows, weights, routes, strict=True)):
        for n, token in enumerate(r.token_N):
            rank = int((r.counts_R2[:, 0].cumsum(0) <= n).sum())
            local = [(k, int(e)) for k, e in enumerate(r.ids_NK[n]) if e < experts_per_rank]
            made = [w[token, k] * (x[token] @ experts[rank * experts_per_rank + e]) for k, e in local]
            partial[source][n] = torch.stack(made).sum(0)
    for x, i, w, r, y in zip(rows, ids, weights, routes, partial, strict=True):
        want = torch.einsum("tk,th,tkhj->tj", w, x, experts[i]) if len(x) else x
        torch.testing.assert_close(combine(y, r.position_TR), want)
