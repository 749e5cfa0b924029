"""The up-projection of the experts with gather and activation: h_s = x_t(s) · W_up + b, a_s = activation(h_s).

Rows of x are read by index in the GEMM's prologue, so no permuted copy of x is ever stored; h (kept for the backward)
and a leave in the epilogue. How many rows there are is known on the device alone. So that the host need not allocate
for all that there might be, only the first `keep` rows of h are stored, and the backward computes `up_again` what is
missing, which is nothing unless this rank got more than its share.
"""

import torch

from expertmesh.backends import use_triton
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference, launch_rows
from expertmesh.kernels.grouping import Grouping


def up_act(
    x_TH: torch.Tensor,
    w_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    keep: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [S, J], a [S, I]) of tokens x [T, H], up-projections [E, H, J] (plain or transposed) and biases [E, J].

    keep: by the fused kernel, h has only this many rows, a multiple of `group.block`.
    """
    if not use_triton(x_TH):
        return up_act_reference(x_TH, w_EHJ, bias_EJ, group, act)
    if act.kind == "custom":
        h_SJ = grouped_gemm(x_TH[group.token_S.long()], w_EHJ, group, bias_EJ)
        return h_SJ, act.forward(h_SJ)
    num_rows = group.slot_S.numel()
    h_SJ = x_TH.new_empty(min(num_rows, keep or num_rows), w_EHJ.shape[2])
    a_SI = x_TH.new_empty(num_rows, w_EHJ.shape[2] // (2 if act.gated else 1))
    launch_rows(x_TH, w_EHJ, bias_EJ, group, h_SJ, a_SI, act)
    return h_SJ, a_SI


def up_again(
    x_TH: torch.Tensor,
    w_EHJ: torch.Tensor,
    bias_EJ: torch.Tensor | None,
    group: Grouping,
    act: Activation,
    h_SJ: torch.Tensor,
) -> torch.Tensor | None:
    """The rows of h that an `up_act` with `keep` did not store, and the `group.block` rows before them, in as far as
    tiles that end behind h have them; None if h has them all.
    """
    missing = group.slot_S.numel() - len(h_SJ)
    if not missing:
        return None
    more_SJ = h_SJ.new_empty(group.block + missing, h_SJ.shape[1])
    launch_rows(x_TH, w_EHJ, bias_EJ, group, more_SJ, None, act)
    return more_SJ


def up_act_reference(
    x_TH: torch.Tensor, w_EHJ: torch.Tensor, bias_EJ: torch.Tensor | None, group: Grouping, act: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `up_act`."""
    h_SJ = grouped_gemm_reference(x_TH, w_EHJ, group, bias_EJ, gather=True)
    return h_SJ, act.forward(h_SJ)
