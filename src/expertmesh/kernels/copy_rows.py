"""Some rows of a matrix into another one, which may lie in another GPU's memory: what push.py sends by.

Stores to a peer travel while they are made, so one pass reads the rows and sends them; a mask of the tokens is all it
needs, and the host learns nothing.
"""

import torch

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched

TILE = 4096  # elements per program


def copy_rows(x_TH: torch.Tensor, needed_T: torch.Tensor, out_TH: torch.Tensor) -> None:
    """out[t] = x[t] where needed[t], bool; other rows of out, contiguous, stay as they are."""
    if not use_triton(x_TH):
        return copy_rows_reference(x_TH, needed_T, out_TH)
    assert needed_T.is_contiguous() and out_TH.is_contiguous() and x_TH.dtype == out_TH.dtype
    num_rows, width = x_TH.shape
    columns = min(triton.next_power_of_2(width), TILE // 4)
    rows = TILE // columns
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, columns))
    _copy_rows_kernel[grid](x_TH.contiguous(), needed_T, out_TH, num_rows, width, ROWS=rows, COLUMNS=columns)


def copy_rows_reference(x_TH: torch.Tensor, needed_T: torch.Tensor, out_TH: torch.Tensor) -> None:
    """The specification of `copy_rows`. On a GPU the host waits for the number of rows."""
    out_TH[needed_T] = x_TH[needed_T]


@launched
def _copy_rows_kernel(x, needed, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = tl.load(needed + row, mask=row < num_rows, other=0) != 0
    mask = wanted[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, tl.load(x + at, mask=mask), mask=mask)
