"""All that Mamba2 does between its two projections: causal convolution, scan, gated norm; see those files.

    gate, xbc, dt = projected          y = norm(scan(conv(xbc), dt), gate)

One autograd function around the kernels: their gradients are written side by side into the projection's, and of what
lies between only the scan's output is kept; the convolution is run again.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from expertmesh.backends import use_triton
from expertmesh.kernels.causal_conv import causal_conv_reference, conv_backward, conv_forward
from expertmesh.kernels.rms_norm import channels_last, gated_norm_reference, launch_backward, launch_forward
from expertmesh.kernels.ssd import Sizes, split, ssd_forward, ssd_reference
from expertmesh.kernels.ssd_backward import ssd_backward


class Mamba2Weights(NamedTuple):
    """K channels of the convolution, H heads, W = H P. A is negative, `-exp(A_log)`; conv_bias may be None."""

    conv_K4: torch.Tensor
    conv_bias_K: torch.Tensor | None
    A_H: torch.Tensor
    D_H: torch.Tensor
    dt_bias_H: torch.Tensor
    norm_W: torch.Tensor


class Mamba2Options(NamedTuple):
    """Width of a head, number of groups, the limits that dt is clamped to, eps of the norm."""

    head_dim: int
    groups: int
    dt_limit: tuple[float, float]
    eps: float


@torch.compiler.disable
def mamba2(
    projected: torch.Tensor,
    weights: Mamba2Weights,
    options: Mamba2Options,
    start_BS: torch.Tensor | None = None,
    mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [B, S, W] in projected's dtype; differentiable once in projected and the weights.

    projected: [B, S, W + K + H], gate, xbc and dt side by side as `in_proj` leaves them; start: [B, S] int32 for packed
    rows (`documents.document_starts`); mask: [B, S], zero where tokens are padding. Must equal what the Mamba2 mixers
    of Transformers do between in_proj and out_proj, document by document.
    """
    if use_triton(projected) and projected.numel():
        return _Mamba2.apply(projected, options, start_BS, mask_BS, *weights)
    return mamba2_reference(projected, weights, options, start_BS, mask_BS)


def mamba2_reference(
    projected: torch.Tensor,
    weights: Mamba2Weights,
    options: Mamba2Options,
    start_BS: torch.Tensor | None = None,
    mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification: the references of the three, one after the other."""
    sizes = _sizes(projected, weights, options)
    gate, xbc, dt = _parts(projected, sizes)
    xbc = _masked(causal_conv_reference(xbc, weights.conv_K4, weights.conv_bias_K, start_BS), mask_BS)
    x, B, C = split(xbc, sizes)
    scanned = ssd_reference(
        x, dt, weights.A_H, B, C, weights.D_H, weights.dt_bias_H, dt_limit=options.dt_limit, start_BS=start_BS
    )
    return gated_norm_reference(scanned.flatten(2), gate, weights.norm_W, options.eps, options.groups)


def _sizes(projected: torch.Tensor, weights: Mamba2Weights, options: Mamba2Options) -> Sizes:
    (B, S, _), P, G = projected.shape, options.head_dim, options.groups
    return Sizes(B, S, len(weights.D_H), P, G, (len(weights.conv_K4) - len(weights.norm_W)) // (2 * G))


def _parts(projected: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Views gate, xbc and dt."""
    width = sizes.H * sizes.P
    return projected.split([width, width + 2 * sizes.G * sizes.N, sizes.H], dim=-1)


def _masked(x_BSK: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    return x_BSK if mask_BS is None else (x_BSK * mask_BS.unsqueeze(-1)).to(x_BSK.dtype)


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: torch.Tensor, options: Mamba2Options, start: torch.Tensor | None,
        mask: torch.Tensor | None, *weights: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        projected, w = channels_last(projected), Mamba2Weights(*weights)  # type: ignore[arg-type]
        ctx.options, ctx.sizes = options, _sizes(projected, w, options)
        gate, xbc, dt = _parts(projected, ctx.sizes)
        xbc = _masked(conv_forward(xbc, w.conv_K4, w.conv_bias_K, start), mask)
        scanned = ssd_forward(xbc, dt, w.A_H, w.D_H, w.dt_bias_H, start, ctx.sizes, options.dt_limit)
        ctx.save_for_backward(projected, start, mask, scanned, *weights)
        return launch_forward(scanned, gate, w.norm_W, options.eps, "float32", options.groups)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        projected, start, mask, scanned, *weights = ctx.saved_tensors
        w, sizes, options = Mamba2Weights(*weights), ctx.sizes, ctx.options
        dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
        (gate, xbc, dt), (dgate, dxbc, ddt) = (_parts(t, sizes) for t in (projected, dprojected))
        dscanned, dnorm = launch_backward(scanned, gate, w.norm_W, dy, dgate, options.eps, "float32", options.groups)
        xbc_out = _masked(conv_forward(xbc, w.conv_K4, w.conv_bias_K, start), mask)
        dxbc_out = torch.empty_like(xbc_out)
        dA, d_dt_bias, dD = ssd_backward(
            xbc_out, dt, w.A_H, w.D_H, w.dt_bias_H, start, sizes, options.dt_limit, dscanned, dxbc_out, ddt
        )
        dconv = conv_backward(xbc, w.conv_K4, w.conv_bias_K, start, _masked(dxbc_out, mask), dxbc)
        small = dA.to(w.A_H.dtype), dD.to(w.D_H.dtype), d_dt_bias.to(w.dt_bias_H.dtype)
        return dprojected, None, None, None, *dconv, *small, dnorm
