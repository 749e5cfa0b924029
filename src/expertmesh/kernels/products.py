"""The six matrix products of a layer of experts: by our Triton kernels, five of them by quack's where it is installed,
all by PyTorch where there is no Triton.

Weights are [E, in, out] views here, plain or transposed.
"""

import torch

from expertmesh.kernels import grouped_gemm as by_triton
from expertmesh.kernels import quack
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_down import down_dact
from expertmesh.kernels.grouped_gemm import grouped_gemm, up_again
from expertmesh.kernels.grouped_wgrad import grouped_wgrad
from expertmesh.kernels.grouping import Grouping

__all__ = ["down", "down_dact", "down_wgrad", "up_act", "up_again", "up_dgrad", "up_wgrad"]


def up_act(
    x_TH: torch.Tensor,
    w_up_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    keep: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(h [S, J], a [S, I], whether columns of h are in turns though not the weights') of tokens x [T, H]; keep: as
    grouped_gemm.py.
    """
    if keep is None and quack.takes_up(x_TH, w_up_EHJ, bias_EJ, group, act):
        return *quack.up_act(x_TH, w_up_EHJ, group, act), act.gated
    return *by_triton.up_act(x_TH, w_up_EHJ, bias_EJ, group, act, keep), False


def down(a_SI: torch.Tensor, w_down_EIH: torch.Tensor, bias_EH: torch.Tensor | None, group: Grouping) -> torch.Tensor:
    """y [S, H] of activations a [S, I]."""
    return _grouped_gemm(a_SI, w_down_EIH, group, bias_EH)


def up_dgrad(dh_SJ: torch.Tensor, w_up_EHJ: torch.Tensor, group: Grouping) -> torch.Tensor:
    """dx [S, H] in sorted order."""
    return _grouped_gemm(dh_SJ, w_up_EHJ.transpose(1, 2), group)


def _grouped_gemm(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    if bias_EN is None and quack.takes(a_SK, w_EKN):
        return quack.grouped_gemm(a_SK, w_EKN, group)
    return grouped_gemm(a_SK, w_EKN, group, bias_EN)


def up_wgrad(
    x_TH: torch.Tensor, dh_SJ: torch.Tensor, group: Grouping, w_up_EHJ: torch.Tensor, scale: float
) -> torch.Tensor:
    """dW [E, H, J], times `scale`, in the memory layout of the parameter that w_up is a view of."""
    return _wgrad(x_TH, dh_SJ, group, w_up_EHJ, scale)


def down_wgrad(
    dout_TH: torch.Tensor, wa_SI: torch.Tensor, group: Grouping, w_down_EIH: torch.Tensor, scale: float
) -> torch.Tensor:
    """dW [E, I, H], times `scale`, in the memory layout of the parameter that w_down is a view of."""
    return _wgrad(dout_TH, wa_SI, group, w_down_EIH.transpose(1, 2), scale).transpose(1, 2)


def _wgrad(g_TG: torch.Tensor, c_SC: torch.Tensor, group: Grouping, w_EGC: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of weights [E, G, C] in the memory layout of their parameter, so that autograd need not copy."""
    if quack.takes(c_SC, w_EGC):
        return quack.wgrad(g_TG, c_SC, group, w_EGC, scale)
    if w_EGC.stride(2) == 1:
        return grouped_wgrad(g_TG, c_SC, group, gathered_first=True, scale=scale)
    return grouped_wgrad(g_TG, c_SC, group, gathered_first=False, scale=scale).transpose(1, 2)
