"""Variable-length attention is causal attention within each document, whatever the rows, heads and widths."""

import pytest
import torch
from torch.nn import functional as F

from expertmesh.kernels.documents import document_mask, supports, varlen_attention
from tests.kernels.compare import assert_same, leaf, outputs_and_grads

LENGTHS = [[5, 1, 0, 10], [16, 0]]  # of the documents in each row of 16; a table of fixed size ends in empty ones


def cu_seqlens() -> torch.Tensor:
    return torch.tensor([0, *(n for row in LENGTHS for n in row)]).cumsum(0).int()


def with_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    mask = document_mask(cu_seqlens(), 2, 16)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("value_width", [8, 16])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_packed_documents_give_what_each_gives_alone(key_heads, value_width, scale):
    leaves = leaf(2, 4, 16, 16), leaf(2, key_heads, 16, 16), leaf(2, key_heads, 16, value_width)
    got = outputs_and_grads(lambda *x: varlen_attention(*x, cu_seqlens(), 16, scale), *leaves)
    assert_same(got, outputs_and_grads(lambda *x: with_mask(*x, scale), *leaves))


def test_the_mask_lets_a_query_see_its_own_document_up_to_itself():
    mask = document_mask(torch.tensor([0, 2, 3, 6]), 2, 3)
    first = [[True, False, False], [True, True, False], [False, False, True]]
    second = [[True, False, False], [True, True, False], [True, True, True]]
    assert mask.tolist() == [[first], [second]]


@pytest.mark.parametrize(
    ("width", "value_width", "fits"), [(128, 128, True), (192, 128, True), (256, 256, True), (264, 264, False),
                                       (60, 60, False), (64, 128, False)]
)  # fmt: skip
def test_the_widths_that_the_kernel_has(width, value_width, fits):
    assert supports(torch.empty(1, 1, 1, width), torch.empty(1, 1, 1, value_width)) == fits


def test_autocast_decides_the_dtype():
    inputs = leaf(1, 2, 6, 8), leaf(1, 2, 6, 8), leaf(1, 2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(*inputs, torch.tensor([0, 2, 6]), 4).dtype == torch.bfloat16
