"""Three of the experts' six products by quack-kernels, on Hopper: the only file that knows its interface.

quack (Apache-2.0, CuTe-DSL, compiled at the first call, kept on disk) has grouped products with rows gathered by index.
Its down-projection and weight gradients are worth 1 to 5 % of a step on an H200, and more in one noisy row
(docs/benchmarks.md). Where an activation is in the epilogue, it wants gate and up columns in turns, which ours do not
have.

The tiles are those that won there: quack's own search would take a minute at the first step.
"""

from typing import Any

import torch

from expertmesh import backends
from expertmesh.kernels.grouping import Grouping

# rows and columns of a tile, and whether two groups of warps take turns at products and epilogues
WIDE = 128, 192, True
WIDEST = 128, 256, False
CLUSTER = 2  # tiles that share what both read


def takes(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether quack computes products of these rows [S or T, …] and weights [E, …, …]: 16-bit floats on Hopper, whole
    16 bytes in every direction, weights contiguous or transposed.
    """
    return (
        backends.has_quack(rows.device)
        and rows.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == rows.dtype
        and len(rows) > 0
        and weight.data_ptr() % 16 == 0
        and all(size % 16 == 0 for size in weight.shape[1:])
        and (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous())
    )


def down(a_SI: torch.Tensor, w_down_EIH: torch.Tensor, group: Grouping) -> torch.Tensor:
    """y [S, H] as products.py."""
    y_SH = a_SI.new_empty(len(a_SI), w_down_EIH.shape[2])
    return _gemm(WIDE, a_SI, w_down_EIH.transpose(1, 2), y_SH, cu_seqlens_m=group.bounds)


def wgrad(g_TG: torch.Tensor, c_SC: torch.Tensor, group: Grouping, w_EGC: torch.Tensor, scale: float) -> torch.Tensor:
    """dW [E, G, C], times `scale`, as w lies in memory: products of gathered rows of g and rows of c."""
    dw_EGC = torch.empty_like(w_EGC)
    tile = WIDEST if dw_EGC.stride(2) == 1 else WIDE
    rows = {"cu_seqlens_k": group.bounds, "A_idx": group.token_S}
    return _gemm(tile, g_TG.t(), c_SC.t(), dw_EGC, alpha=scale, **rows)


def _gemm(
    tile: tuple[int, int, bool], a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **options: Any
) -> torch.Tensor:
    """out = a · bᵀ of each expert; a [M, K], b [(E,) N, K]."""
    from quack.gemm import gemm

    rows, columns, pingpong = tile
    gemm(a, b, out, None, None, rows, columns, CLUSTER, 1, pingpong=pingpong, persistent=True, **options)
    return out
