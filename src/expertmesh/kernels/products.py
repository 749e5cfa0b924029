"""The matrix products of a layer of experts: by our Triton kernels, all but two by quack's where it is installed, and
all by PyTorch where there is no Triton.

Weights are [E, in, out] views here, plain or transposed.
"""

import torch

from expertmesh.kernels import grouped_gemm as gemms
from expertmesh.kernels import quack
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_down import down_dact
from expertmesh.kernels.grouped_gemm import up_again
from expertmesh.kernels.grouped_wgrad import grouped_wgrad
from expertmesh.kernels.grouping import Grouping

__all__ = ["down_dact", "grouped_gemm", "up_act", "up_again", "wgrad"]


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
    return *gemms.up_act(x_TH, w_up_EHJ, bias_EJ, group, act, keep), False


def grouped_gemm(
    a_SK: torch.Tensor, w_EKN: torch.Tensor, group: Grouping, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """[S, N] of rows a [S, K] in sorted order: the down-projection, and the up-projection's input gradient."""
    if bias_EN is None and quack.takes(a_SK, w_EKN):
        return quack.grouped_gemm(a_SK, w_EKN, group)
    return gemms.grouped_gemm(a_SK, w_EKN, group, bias_EN)


def wgrad(g_TG: torch.Tensor, c_SC: torch.Tensor, group: Grouping, w_EGC: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of weights [E, G, C], times `scale`, from tokens' g, by index, and rows' c in sorted order.

    It has the memory layout of the parameter that w is a view of, so that autograd need not copy.
    """
    if quack.takes(c_SC, w_EGC):
        return quack.wgrad(g_TG, c_SC, group, w_EGC, scale)
    if w_EGC.stride(2) == 1:
        return grouped_wgrad(g_TG, c_SC, group, gathered_first=True, scale=scale)
    return grouped_wgrad(g_TG, c_SC, group, gathered_first=False, scale=scale).transpose(1, 2)
