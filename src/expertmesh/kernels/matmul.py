"""Float32 matrix products on a CPU: oneDNN's, which PyTorch carries beside MKL and uses in compiled code.

On an AMD EPYC with AVX-512 it was measured at twice MKL's speed, on one without at the same: there MKL computes. oneDNN
compiles a kernel for every shape it meets, in 0.4 ms, so the number of rows is rounded up: however tokens are routed,
shapes stay few.
"""

import torch
from torch.nn import functional as F

from expertmesh.backends import has_onednn

_ROWS = 32
_SMALL = 2**20  # multiplications; below this the call costs more than the product


def mm_out(a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor) -> None:
    """out = a @ b, as `torch.mm(a, b, out=out)`; any device, dtype and strides."""
    (num_rows, num_inner), num_columns = a_MK.shape, b_KN.shape[1]
    small = num_rows * num_inner * num_columns < _SMALL
    if small or a_MK.dtype != torch.float32 or a_MK.device.type != "cpu" or not has_onednn():
        torch.mm(a_MK, b_KN, out=out_MN)
        return
    if num_rows % _ROWS:
        a_MK = F.pad(a_MK, (0, 0, 0, -num_rows % _ROWS))
    product = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    out_MN.copy_(product[:num_rows])
