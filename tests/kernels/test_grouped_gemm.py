"""Weights may lie in memory as they like: in place where the kernels can read them, else copied, never misread."""

import pytest
import torch

from expertmesh import backends
from expertmesh.kernels import grouped_gemm as module
from expertmesh.kernels.grouping import group_by_expert
from tests.kernels.compare import on_triton

EXPERTS, INNER, COLUMNS, TOKENS = 4, 24, 40, 30


def strides(kind: str) -> torch.Tensor:
    weights = torch.randn(EXPERTS, INNER, COLUMNS)
    if kind == "transposed":
        return weights.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every second column":
        return torch.randn(EXPERTS, INNER, 2 * COLUMNS)[..., ::2]
    if kind == "experts innermost":
        return weights.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if kind == "unaligned":
        flat = torch.empty(weights.numel() + 1)[1:]
        return flat.copy_(weights.flatten()).view(weights.shape)
    return weights


@pytest.mark.parametrize("kind", ["plain", "transposed", "every second column", "experts innermost", "unaligned"])
def test_weights_of_any_strides(kind):
    torch.manual_seed(0)
    weights, ids = strides(kind), torch.randint(0, EXPERTS, (TOKENS, 2))
    with on_triton():
        group = group_by_expert(ids, EXPERTS, torch.rand(TOKENS, 2))
        rows = torch.randn(2 * TOKENS, INNER)
        got = module.grouped_gemm(rows, module.Weights(weights), group)
    want = module.grouped_gemm(rows, module.Weights(weights), group_by_expert(ids, EXPERTS, torch.rand(TOKENS, 2)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_copies_of_weights_are_told_once(monkeypatch):
    told = set()
    monkeypatch.setattr(backends, "_warned", told)
    for _ in range(2):
        module.tiles_of(torch.empty(4 * 8 + 1)[1:].view(4, 8), 4, 8)
        module.weight_tiles(torch.empty(2, 4, 16)[..., :8], 4, 8)
    assert len(told) == 2 and all("copied in every step" in line for line in told)


def test_rows_that_are_no_whole_pieces_of_16_bytes_are_refused():
    with pytest.raises(ValueError, match=r"fused=\{'experts': False\}"):
        module.tiles_of(torch.empty(4, 7), 4, 8)
