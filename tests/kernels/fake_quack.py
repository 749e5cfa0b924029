"""quack-kernels 0.6.5's functions that this project calls, their signatures and layouts, computed by PyTorch."""

import types

import torch
from torch.nn import functional as F


def segments(bounds):
    return [slice(a, b) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def alternating(x):
    """The halves of the columns, one of each in turn."""
    return torch.stack(x.chunk(2, dim=1), dim=2).flatten(1)


def gemm(
    a, b, out, c, semaphore, *tile, pingpong, persistent, is_dynamic_persistent, alpha=1.0, cu_seqlens_m=None,
    cu_seqlens_k=None, A_idx=None,
):  # fmt: skip
    """out = alpha · a · bᵀ, row groups of a and out, or column groups of a and b."""
    assert c is None and len(tile) == 4 and persistent
    assert semaphore.dtype == torch.int32 and semaphore.tolist() == [0] if is_dynamic_persistent else semaphore is None
    if cu_seqlens_k is not None:
        assert a.stride(0) == b.stride(0) == 1
        for expert, rows in enumerate(segments(cu_seqlens_k)):
            out[expert] = alpha * (a[:, A_idx[rows].long()] @ b[:, rows].t())
    else:
        assert A_idx is None
        for expert, rows in enumerate(segments(cu_seqlens_m)):
            out[rows] = alpha * (a[rows] @ b[expert].t())


def activated(h, activation):
    if activation == "swiglu":
        return F.silu(h[:, ::2]) * h[:, 1::2]
    assert activation == "relu_sq"
    return F.relu(h).square()


def rows_of(a, b, cu_seqlens_m, A_idx):
    """a[A_idx] · b of each expert; what belongs to none is not written."""
    out = a.new_full((len(A_idx), b.shape[2]), torch.nan)
    for expert, rows in enumerate(segments(cu_seqlens_m)):
        out[rows] = a[A_idx[rows].long()] @ b[expert]
    return out


def gemm_act(a, b, *, activation, concat_layout, dynamic_scheduler, tuned, config, cu_seqlens_m, A_idx):
    """Weights in halves, h with gate and up in turns."""
    assert not tuned and b.stride(1) == 1 and concat_layout == (("B",) if activation == "swiglu" else None)
    assert dynamic_scheduler == config.is_dynamic_persistent
    h = rows_of(a, b, cu_seqlens_m, A_idx)
    h = alternating(h) if concat_layout else h
    return h, activated(h, activation)


def gemm_dact(
    a, b, pre, *, activation, colvec_scale, colvec_reduce, dynamic_scheduler, tuned, config, cu_seqlens_m, A_idx
):
    """(dh in turns, scaled a, its product with the unscaled gradient)."""
    assert colvec_reduce and dynamic_scheduler == config.is_dynamic_persistent and not tuned
    da = rows_of(a, b, cu_seqlens_m, A_idx)
    pre = pre.clone().requires_grad_()
    with torch.enable_grad():
        post = activated(pre, activation)
        (dpre,) = torch.autograd.grad(post, pre, da * colvec_scale[:, None])
    return dpre, post.detach() * colvec_scale[:, None], (post.detach() * da).sum(1)


MODULES = {
    "quack": {},
    "quack.gemm": {"gemm": gemm},
    "quack.gemm_interface": {"gemm_act": gemm_act, "gemm_dact": gemm_dact},
    "quack.gemm_config": {"GemmConfig": types.SimpleNamespace},
}
