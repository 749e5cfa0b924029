"""Un-permuting equals its reference: weighted sums of rows, and one number per row."""

import contextlib

import pytest
import torch

from expertmesh.kernels.grouping import combine, combine_into, combine_reference, group_by_expert, unsort
from tests.kernels.compare import assert_same, on_triton


def positions(tokens: int, top_k: int, skipped: int) -> torch.Tensor:
    """A permutation of all rows [T, K] in which `skipped` of them are marked as not computed."""
    position = torch.randperm(tokens * top_k, dtype=torch.int32)
    position[:skipped] = -1
    return position[torch.randperm(tokens * top_k)].view(tokens, top_k)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "top_k", "width", "skipped"), [(1, 1, 3, 0), (7, 3, 40, 5), (5, 2, 1500, 10)])
def test_combine_kernel_equals_its_reference(tokens, top_k, width, skipped, weighted, residual):
    y, position = torch.randn(tokens * top_k, width), positions(tokens, top_k, skipped)
    weight = torch.rand(tokens, top_k) if weighted else None
    added = torch.randn(tokens, 2 * width)[:, :width] if residual else None
    expected = combine_reference(y, position, weight, added)
    with on_triton():
        assert_same([combine(y, position, weight, added)], [expected])


@pytest.mark.parametrize("num_residual", [0, 2, 4])
@pytest.mark.parametrize(("outs", "width"), [(1, 40), (2, 40), (3, 1500)])
def test_pieces_go_where_they_are_wanted_with_a_residual_in_one(outs, width, num_residual):
    y, position, weight = torch.randn(8 * outs, width), positions(4 * outs, 2, 3), torch.rand(4 * outs, 2)
    residual = torch.randn(num_residual, width) if num_residual else None
    expected = combine_reference(y, position, weight).view(outs, 4, width)
    expected[-1, :num_residual] += 0 if residual is None else residual
    for context in (on_triton(), contextlib.nullcontext()):
        pieces = [torch.full((6, width), torch.nan)[2:] for _ in range(outs)]  # in larger mailboxes
        with context:
            combine_into(pieces, outs - 1, y, position, weight, residual)
        assert_same(pieces, list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "parts", "experts"), [(1, 1, 1, 8), (7, 3, 2, 5), (300, 2, 6, 0)])
def test_unsort_kernel_equals_its_reference_and_gives_skipped_pairs_zero(tokens, top_k, parts, experts, dtype):
    """Of the pairs those of 8 experts are here, of which so many are chosen, or an expert that is not."""
    ids = torch.where(torch.rand(tokens, top_k) < 0.7, torch.randint(0, max(experts, 1), (tokens, top_k)), 8)
    ids = ids if experts else torch.full_like(ids, 8)
    want = group_by_expert(ids, 8, torch.rand(ids.shape))
    value = torch.randn(parts, tokens * top_k)
    value[:, want.bounds[-1] :] = torch.nan  # rows that nobody computes hold anything
    with on_triton():
        got = unsort(value, group_by_expert(ids, 8, torch.rand(ids.shape)), dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3  # sums in another order may round to a neighbour
    assert_same([got], [unsort(value, want, dtype)], tolerance)
    assert not got[ids == 8].any()


def test_no_tokens_give_an_empty_result():
    ids = torch.empty(0, 2, dtype=torch.int64)
    with on_triton():
        group = group_by_expert(ids, 4, torch.empty(0, 2))
        assert unsort(torch.empty(1, 0), group, torch.float32).shape == (0, 2) and not group.bounds.any()
