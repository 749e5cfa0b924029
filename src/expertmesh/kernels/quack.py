"""The six matrix products of a layer of experts by quack-kernels, on Hopper: the only file that knows its interface.

quack (Apache-2.0, CuTe-DSL, compiled at the first call, kept on disk) has grouped products with what ours in
products.py have: rows gathered by index, activations and their gradients in the epilogue, the routing weights' gradient
beside them. One by one its products are the faster, most by a sixth; of a whole step that was a hundredth so far
(docs/benchmarks.md). Gate and up columns of h and dh alternate here, whatever the layout of the weights.

The tiles are those that won on an H200: quack's own search would take a minute at the first step.
"""

from functools import cache
from typing import Any

import torch

from expertmesh import backends
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import Grouping

ACTIVATIONS = {"silu": "swiglu", "relu2": "relu_sq"}  # quack's names
# rows and columns of a tile, and whether two groups of warps take turns at products and epilogues
TILES = {
    "up_act": (128, 192, True),
    "down": (128, 192, True),
    "down_dact": (128, 128, True),
    "up_dgrad": (128, 192, True),
    "up_wgrad": (128, 192, True),
    "down_wgrad": (128, 256, False),
}
CLUSTER = 2  # tiles that share what both read


def takes(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, w_down_EIH: torch.Tensor, bias: torch.Tensor | None, act: Activation
) -> bool:
    """Whether quack computes this layer: 16-bit floats on Hopper, an activation that it knows, no biases, weights that
    are transposed views of contiguous ones with rows of whole 16 bytes.
    """
    return (
        backends.has_quack(x_TH.device)
        and x_TH.dtype in (torch.bfloat16, torch.float16)
        and act.kind in ACTIVATIONS
        and not act.interleaved
        and bias is None
        and len(x_TH) > 0
        and all(
            w.transpose(1, 2).is_contiguous()
            and w.shape[1] % 8 == 0
            and w.shape[2] % 16 == 0
            and w.data_ptr() % 16 == 0
            and w.dtype == x_TH.dtype
            for w in (w_up_EHJ, w_down_EIH)
        )
    )


def up_act(
    x_TH: torch.Tensor, w_up_EHJ: torch.Tensor, bias_EJ: None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) as products.py, with gate and up columns of h in turns."""
    from quack.gemm_interface import gemm_act

    return gemm_act(
        x_TH,
        w_up_EHJ,
        activation=ACTIVATIONS[act.kind],
        cu_seqlens_m=group.bounds,
        A_idx=group.token_S,
        concat_layout=_in_turns("B", act),
        tuned=False,
        config=_config("up_act"),
    )


def down(a_SI: torch.Tensor, w_down_EIH: torch.Tensor, bias_EH: None, group: Grouping) -> torch.Tensor:
    """y [S, H] as products.py."""
    y_SH = a_SI.new_empty(len(a_SI), w_down_EIH.shape[2])
    return _gemm("down", a_SI, w_down_EIH.transpose(1, 2), y_SH, cu_seqlens_m=group.bounds)


def down_dact(
    dout_TH: torch.Tensor,
    w_down_EIH: torch.Tensor,
    h_SJ: torch.Tensor,
    group: Grouping,
    act: Activation,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """(dh [S, J], weight·a [S, I], dweight [1, S], None) as products.py, columns of h and dh in turns."""
    from quack.gemm_interface import gemm_dact

    assert not has_bias
    dh_SJ, wa_SI, dweight_S = gemm_dact(
        dout_TH,
        w_down_EIH.transpose(1, 2),
        h_SJ,
        activation=ACTIVATIONS[act.kind],
        colvec_scale=group.weight_S,
        colvec_reduce=True,
        cu_seqlens_m=group.bounds,
        A_idx=group.token_S,
        dynamic_scheduler=False,
        tuned=False,
        config=_config("down_dact"),
    )
    return dh_SJ, wa_SI, dweight_S[None], None


def up_dgrad(dh_SJ: torch.Tensor, w_up_EHJ: torch.Tensor, group: Grouping, act: Activation) -> torch.Tensor:
    """dx [S, H] as products.py."""
    dx_SH = dh_SJ.new_empty(len(dh_SJ), w_up_EHJ.shape[1])
    return _gemm("up_dgrad", dh_SJ, w_up_EHJ, dx_SH, cu_seqlens_m=group.bounds, concat_layout=_in_turns("B", act))


def up_wgrad(
    x_TH: torch.Tensor, dh_SJ: torch.Tensor, group: Grouping, w_up_EHJ: torch.Tensor, act: Activation, scale: float
) -> torch.Tensor:
    """dW [E, H, J] as products.py."""
    dw_EHJ = torch.empty_like(w_up_EHJ)
    return _wgrad("up_wgrad", x_TH, dh_SJ, dw_EHJ, group, scale, concat_layout=_in_turns("out", act))


def down_wgrad(
    dout_TH: torch.Tensor, wa_SI: torch.Tensor, group: Grouping, w_down_EIH: torch.Tensor, scale: float
) -> torch.Tensor:
    """dW [E, I, H] as products.py."""
    dw_EIH = torch.empty_like(w_down_EIH)
    return _wgrad("down_wgrad", dout_TH, wa_SI, dw_EIH.transpose(1, 2), group, scale).transpose(1, 2)


def _wgrad(
    name: str, g_TG: torch.Tensor, c_SC: torch.Tensor, dw_EGC: torch.Tensor, group: Grouping, scale: float, **more: Any
) -> torch.Tensor:
    rows = {"cu_seqlens_k": group.bounds, "A_idx": group.token_S}
    return _gemm(name, g_TG.t(), c_SC.t(), dw_EGC, alpha=scale, **rows, **more)


def _gemm(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **options: Any) -> torch.Tensor:
    """out = a · bᵀ of each expert; a [M, K], b [(E,) N, K]."""
    from quack.gemm import gemm

    rows, columns, pingpong = TILES[name]
    gemm(a, b, out, None, None, rows, columns, CLUSTER, 1, pingpong=pingpong, persistent=True, **options)
    return out


@cache  # quack keeps plans by the identity of a configuration: it must outlive its calls
def _config(name: str) -> Any:
    from quack.gemm_config import GemmConfig

    rows, columns, pingpong = TILES[name]
    return GemmConfig(
        tile_m=rows, tile_n=columns, pingpong=pingpong, cluster_m=CLUSTER, cluster_n=1, is_dynamic_persistent=False
    )


def _in_turns(operand: str, act: Activation) -> tuple[str, ...] | None:
    """The operand whose halves, gate and up, quack is to read or write as if they alternated, as h and dh do."""
    return (operand,) if act.gated else None
