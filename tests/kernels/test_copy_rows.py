"""Rows that are wanted arrive, whole; all other memory stays as it was, and nothing of it is read."""

import pytest
import torch

from expertmesh.kernels.copy_rows import TILE, copy_rows, copy_rows_reference
from tests.kernels.compare import on_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (700, 3), (9, 40), (5, TILE // 4 + 100), (3, 2 * TILE)])
def test_copy_rows_kernel_equals_its_reference(rows, width, dtype):
    x, needed = torch.randn(rows, width).to(dtype), torch.rand(rows) < 0.5
    expected, got = torch.full((2, rows + 2, width), -7, dtype=dtype).unbind()
    copy_rows_reference(x, needed, expected[1:-1])
    with on_triton():
        copy_rows(x, needed, got[1:-1])
    assert torch.equal(got, expected)
    assert torch.equal(got[1:-1][needed], x[needed]) and (got[1:-1][~needed] == -7).all()


def test_rows_with_gaps_are_copied_too():
    x, out = torch.randn(6, 10)[:, ::2], torch.zeros(6, 5)
    with on_triton():
        copy_rows(x, torch.ones(6, dtype=torch.bool), out)
    assert torch.equal(out, x)
