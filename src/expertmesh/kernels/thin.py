"""The products of adapters of low rank on experts whose result is thin: R columns, a multiple of 16.

    thin_rows:   u_s = x_s · A_eᵀ          A [E, R, K], u [S, R]
    thin_wgrad:  dA_e = Σ_s du_s ⊗ x_s     over the rows s of expert e

What they take is the time to read the wide operand, which each does once.
"""

from dataclasses import replace

import torch

from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_gemm import grouped_gemm, launch_rows
from expertmesh.kernels.grouped_wgrad import grouped_wgrad
from expertmesh.kernels.grouping import Grouping


def thin_rows(x: torch.Tensor, factor_ERK: torch.Tensor, group: Grouping, gathered: bool) -> torch.Tensor:
    """u [S, R]: row s of x [S, K], or if `gathered` its token's of x [T, K], times the factor of its expert.

    On Triton rows behind the last expert's are zero: `thin_wgrad` may read them.
    """
    factor_EKR = factor_ERK.transpose(1, 2)
    if group.tiles is None:
        return grouped_gemm(x.index_select(0, group.token_S) if gathered else x, factor_EKR, group)
    u_SR = x.new_zeros(group.slot_S.numel(), factor_EKR.shape[2])
    by_index = (u_SR, Activation("none", gated=False)) if gathered else ()
    launch_rows(x, factor_EKR, None, group, u_SR, *by_index)
    return u_SR


def thin_wgrad(
    x: torch.Tensor, du_SR: torch.Tensor, factor_ERK: torch.Tensor, group: Grouping, gathered: bool
) -> torch.Tensor:
    """dA [E, R, K] from du [S, R] and x as in `thin_rows`. Float32 sums, result in x's dtype."""
    if not gathered:
        group = replace(group, token_S=torch.arange(len(x), dtype=torch.int32, device=x.device))
    return grouped_wgrad(x, du_SR, group, factor_ERK.transpose(1, 2), own=True).transpose(1, 2)
