"""Five of the experts' six products by quack-kernels, on Hopper: the only file that knows its interface.

quack (Apache-2.0, CuTe-DSL, compiled at the first call, kept on disk) has grouped products with rows gathered by index.
Its up-projection leaves gate and up columns of h in turns, whatever the layout of the weights; our `down_dact` reads
both.

quack's own search would take a minute at the first step. The tiles here won on an H200 at the widths of Qwen3-30B-A3B,
Nemotron-3-Nano, GPT-OSS-20B and DeepSeek-V3, with rows spread at random and unevenly: of those that win with many rows
and with few, the one that computes the least beyond a matrix' edges.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from expertmesh import backends
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import Grouping

ACTIVATIONS = {"silu": "swiglu", "relu2": "relu_sq"}  # quack's names


class Tile(NamedTuple):
    """What a block of threads computes at once; whether two groups of warps take turns at products and epilogues; how
    many neighbours below and to the right of one another share what they read.

    Except where groups of warps take turns, a block that is done takes the next tile that nobody has: faster, above all
    where experts are unequal. quack's own `config_supports` refuses this with rows gathered by index on Hopper. It is
    right all the same: the barrier behind which a block takes its next tile counts the four warps that gather
    (`make_sched_pipeline` and `num_ab_load_warps` in quack's gemm_sm90.py).
    """

    rows: int
    columns: int
    pingpong: bool
    below: int
    right: int


MANY = 128  # rows of an expert from which on no family's step was slower by more than noise; fewer were not tried
ROWS = Tile(128, 256, False, 1, 1), Tile(128, 192, True, 1, 2)
WGRAD = Tile(256, 192, False, 2, 1), Tile(128, 256, False, 2, 1), Tile(128, 192, True, 2, 1)


def supports(rows: torch.Tensor, weight: torch.Tensor) -> bool:
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


def supports_up(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> bool:
    """Whether quack computes this up-projection of group's rows: many, and halves of transposed weights."""
    known = act.kind in ACTIVATIONS and not act.interleaved and bias_EJ is None and w_up_EHJ.stride(1) == 1
    return known and len(group.token_S) >= MANY * len(w_up_EHJ) and supports(x_TH, w_up_EHJ)


def up_act(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) as grouped_gemm.py, a gated h with its columns in turns."""
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
    """The first of `ROWS`. quack keeps plans by its identity, so it must outlive its calls."""
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_m=128, tile_n=256, pingpong=False, is_dynamic_persistent=True, cluster_m=1, cluster_n=1)


def grouped_gemm(a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping) -> torch.Tensor:
    """y [S, N] as grouped_gemm.py."""
    y_SN = a_SK.new_empty(len(a_SK), w_EKN.shape[2])
    tile = _least_waste(ROWS, 1, w_EKN.shape[2])
    return gemm(tile, a_SK, w_EKN.transpose(1, 2), y_SN, cu_seqlens_m=group.bounds)


def wgrad(g_TG: torch.Tensor, c_SC: torch.Tensor, group: Grouping, w_EGC: torch.Tensor, scale: float) -> torch.Tensor:
    """dW [E, G, C], times `scale`, as w lies in memory: products of gathered rows of g and rows of c."""
    dw_EGC = torch.empty_like(w_EGC)
    tile = _least_waste(WGRAD, *dw_EGC.shape[1:])
    return gemm(tile, g_TG.t(), c_SC.t(), dw_EGC, alpha=scale, cu_seqlens_k=group.bounds, A_idx=group.token_S)


@cache
def _least_waste(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """The first of the tiles that cover a matrix with the fewest elements outside of it."""
    return min(tiles, key=lambda tile: -(-rows // tile.rows) * tile.rows * (-(-columns // tile.columns) * tile.columns))


def gemm(tile: Tile, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **options: Any) -> torch.Tensor:
    """out = a · bᵀ of each expert; a [M, K], b [(E,) N, K]."""
    from quack.gemm import gemm as by_quack

    rows, columns, pingpong, *cluster = tile
    taken = None if pingpong else torch.zeros(1, dtype=torch.int32, device=out.device)
    options |= {"pingpong": pingpong, "persistent": True, "is_dynamic_persistent": not pingpong}
    by_quack(a, b, out, None, taken, rows, columns, *cluster, **options)
    return out
