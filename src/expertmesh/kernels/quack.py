"""Five of the experts' six products with quack-kernels on Hopper. Only this file knows quack's interface.

quack (Apache-2.0, CuTe-DSL; it compiles at the first call and caches on disk) has grouped GEMMs that gather rows by
index. Its up-projection always interleaves the gate and up columns of h; our `down_dact` reads both layouts.

quack's autotuner would take a minute in the first step, so tiles are fixed here. They won on an H200 at the widths of
Qwen3-30B-A3B, Nemotron-3-Nano, GPT-OSS-20B and DeepSeek-V3, with random and with skewed routing. Of the tiles that win
with many and with few rows, `_least_waste` picks the one that computes the least outside the matrix.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import Grouping

ACTIVATIONS = {"silu": "swiglu", "relu2": "relu_sq"}  # our kind: quack's name


class Tile(NamedTuple):
    """Output tile of a thread block; whether two warp groups alternate between products and epilogues (pingpong); size
    of the thread block cluster that shares loads, along rows and columns.

    Without pingpong a block that is done takes the next free tile (dynamic scheduling). This is faster, above all with
    unequal experts. quack's `config_supports` rejects dynamic scheduling with gathered rows on Hopper, but it is
    correct: the scheduler's barrier counts the four warps that gather (`make_sched_pipeline` and `num_ab_load_warps` in
    quack's gemm_sm90.py).
    """

    rows: int
    columns: int
    pingpong: bool
    cluster_rows: int
    cluster_columns: int


MIN_ROWS = 128  # mean rows per expert; from here on no family's step was slower beyond noise, fewer were not tried
ROWS = Tile(128, 256, False, 1, 1), Tile(128, 192, True, 1, 2)
WGRAD = Tile(256, 192, False, 2, 1), Tile(128, 256, False, 2, 1), Tile(128, 192, True, 2, 1)


def supports(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether quack computes products of rows [S or T, ...] and weights [E, ..., ...]. It needs 16-bit floats on
    Hopper, widths that are multiples of 16, aligned weights, and weights that are contiguous or transposed.
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


def supports_up(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> bool:
    """Whether quack computes this up-projection. Needs many rows, transposed weights, halves, no bias."""
    plain = act.kind in ACTIVATIONS and not act.interleaved and bias_EJ is None and w_up_EHJ.stride(1) == 1
    return plain and len(group.token_S) >= MIN_ROWS * len(w_up_EHJ) and supports(x_TH, w_up_EHJ)


def up_act(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (h [S, J], a [S, I]) as grouped_gemm.py does, but the columns of a gated h are interleaved."""
    from quack.gemm_interface import gemm_act

    return gemm_act(
        x_TH,
        w_up_EHJ,
        activation=ACTIVATIONS[act.kind],
        cu_seqlens_m=group.bounds,
        A_idx=group.token_S,
        concat_layout=("B",) if act.gated else None,
        dynamic_scheduler=True,
        tuned=False,
        config=_up_config(),
    )


@cache
def _up_config() -> Any:
    """Return the first of `ROWS` as quack's config. quack caches plans by its identity, so it must stay alive."""
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_m=128, tile_n=256, pingpong=False, is_dynamic_persistent=True, cluster_m=1, cluster_n=1)


def grouped_gemm(a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """Return y [S, N] as grouped_gemm.py does."""
    y_SN = a_SK.new_empty(len(a_SK), w_EKN.shape[2])
    tile = _least_waste(ROWS, 1, w_EKN.shape[2])
    return gemm(tile, a_SK, w_EKN.transpose(1, 2), y_SN, cu_seqlens_m=group.bounds)


def wgrad(g_TG: torch.Tensor, c_SC: torch.Tensor, group: Grouping, w_EGC: torch.Tensor, scale: float) -> torch.Tensor:
    """Return dW [E, G, C] in the memory layout of w: `scale` times the products of gathered rows of g and rows of c."""
    dw_EGC = torch.empty_like(w_EGC)
    tile = _least_waste(WGRAD, *dw_EGC.shape[1:])
    return gemm(tile, g_TG.t(), c_SC.t(), dw_EGC, alpha=scale, cu_seqlens_k=group.bounds, A_idx=group.token_S)


@cache
def _least_waste(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """Return the first of the tiles that cover a matrix with the fewest elements outside of it."""
    return min(tiles, key=lambda tile: -(-rows // tile.rows) * tile.rows * (-(-columns // tile.columns) * tile.columns))


def gemm(tile: Tile, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **options: Any) -> torch.Tensor:
    """Compute out = a · bᵀ for each expert; a [M, K], b [(E,) N, K]."""
    from quack.gemm import gemm as quack_gemm

    rows, columns, pingpong, *cluster = tile
    tile_counter = None if pingpong else torch.zeros(1, dtype=torch.int32, device=out.device)
    options |= {"pingpong": pingpong, "persistent": True, "is_dynamic_persistent": not pingpong}
    quack_gemm(a, b, out, None, tile_counter, rows, columns, *cluster, **options)
    return out
