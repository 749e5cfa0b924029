"""The counting sort equals a stable sort, on any routing, and its tiles cover every row once."""

import pytest
import torch

from expertmesh import backends
from expertmesh.kernels.grouping import group_by_expert, group_by_expert_reference

ROUTINGS = {
    "random": lambda tokens, k, experts: torch.randint(0, experts, (tokens, k)),
    "one expert": lambda tokens, k, experts: torch.full((tokens, k), experts // 2),
    "first and last": lambda tokens, k, experts: torch.randint(0, 2, (tokens, k)) * (experts - 1),
    "sentinels": lambda tokens, k, experts: torch.randint(0, experts + 1, (tokens, k)),
    "nothing here": lambda tokens, k, experts: torch.full((tokens, k), experts),
}


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("tokens,k,experts", [(1, 1, 1), (37, 3, 6), (300, 2, 5), (65, 8, 16), (700, 3, 40)])
def test_grouping_kernel_equals_the_stable_sort(kind, tokens, k, experts):
    torch.manual_seed(0)
    ids = ROUTINGS[kind](tokens, k, experts)
    weight = torch.rand(tokens, k)
    want = group_by_expert_reference(ids, experts, weight)
    with backends.interpreted():
        got = group_by_expert(ids, experts, weight)
    computed = int(want.bounds[-1])
    assert torch.equal(got.weight_S, want.weight_S)
    assert torch.equal(got.bounds, want.bounds)
    assert torch.equal(got.position_TK, want.position_TK)
    assert torch.equal(got.token_S, want.token_S)

    expert, first_row, used = got.tiles
    covered = torch.zeros(ids.numel(), dtype=torch.int)
    for e, row in zip(expert[:used].tolist(), first_row[:used].tolist(), strict=True):
        end = min(row + got.block, int(want.bounds[e + 1]))
        covered[row:end] += 1
        assert (ids[(want.position_TK >= row) & (want.position_TK < end)] == e).all()
    assert (covered[:computed] == 1).all() and (covered[computed:] == 0).all()


@pytest.mark.parametrize("kind", ROUTINGS)
def test_rows_of_others_take_no_room_where_it_is_known_how_many_are_here(kind):
    torch.manual_seed(0)
    ids, weight = ROUTINGS[kind](65, 8, 16), torch.rand(65, 8)
    every = group_by_expert_reference(ids, 16, weight)
    here = max(1, int(every.bounds[-1]))
    want = group_by_expert_reference(ids, 16, weight, here)
    with backends.interpreted():
        got = group_by_expert(ids, 16, weight, here)
    for name in ("token_S", "weight_S"):
        assert len(getattr(got, name)) == here
        assert torch.equal(getattr(got, name), getattr(want, name))
        assert torch.equal(getattr(got, name), getattr(every, name)[:here])
    assert torch.equal(got.position_TK, every.position_TK) and torch.equal(got.bounds, every.bounds)
    assert int(got.tiles[2]) <= len(got.tiles[0])
