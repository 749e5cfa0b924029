"""Mamba2 between its two projections: causal convolution, scan and gated norm in one autograd function.

    gate, xbc, dt = projected          y = norm(scan(conv(xbc), dt), gate)

The kernels are in causal_conv.py, ssd.py and rms_norm.py. In the backward they write their gradients into slices of the
gradient of `projected`. Of the intermediate results only the scan's output is saved; the convolution is recomputed.
"""

import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h

from expertmesh.backends import graph_break, triton_or_reference
from expertmesh.kernels.causal_conv import conv_backward, conv_forward
from expertmesh.kernels.documents import per_document
from expertmesh.kernels.rms_norm import launch_backward, launch_forward, unit_stride
from expertmesh.kernels.ssd import Sizes, split, ssd_forward
from expertmesh.kernels.ssd_backward import ssd_backward

#: references of the three steps: Transformers' PyTorch functions, unwrapped so that no optional library replaces them
conv_reference, scan_reference = map(inspect.unwrap, (nemotron_h.causal_conv1d_fn, nemotron_h.mamba2_chunk_scan))
norm_reference: Any = nemotron_h.NemotronHRMSNormGated.forward


class Mamba2Weights(NamedTuple):
    """Weights of K convolution channels, H heads and W = H P channels. A is `-exp(A_log)`; conv_bias may be None."""

    conv_K4: torch.Tensor
    conv_bias_K: torch.Tensor | None
    A_H: torch.Tensor
    D_H: torch.Tensor
    dt_bias_H: torch.Tensor
    norm_W: torch.Tensor


class Mamba2Options(NamedTuple):
    """Head width, number of groups, the range that dt is clamped to, and eps of the norm."""

    head_dim: int
    groups: int
    dt_limit: tuple[float, float]
    eps: float


def mamba2_reference(
    projected: torch.Tensor,
    weights: Mamba2Weights,
    options: Mamba2Options,
    start_BS: torch.Tensor | None = None,
    mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return y [B, S, W] in projected's dtype. Reference of `mamba2`: Transformers' functions on each document.

    projected: [B, S, W + K + H], the output of `in_proj`: gate, xbc and dt concatenated. start: [B, S] int32 for packed
    rows (`documents.document_starts`). mask: [B, S], zero at padding. `mamba2` is once differentiable.
    """
    if start_BS is not None:
        one_document = lambda x, mask: mamba2_reference(x, weights, options, None, mask)  # noqa: E731
        return per_document(one_document, start_BS, projected, mask_BS)
    sizes = _sizes(projected, weights, options)
    gate, xbc, dt = _parts(projected, sizes)
    xbc = conv_reference(xbc.transpose(1, 2), weights.conv_K4, weights.conv_bias_K, "silu").transpose(1, 2)
    x, B, C = split(nemotron_h.apply_mask_to_padding_states(xbc, mask_BS), sizes)
    extras = dict(D=weights.D_H, dt_bias=weights.dt_bias_H, dt_softplus=True, dt_limit=options.dt_limit)
    scanned = scan_reference(x, dt, weights.A_H, B, C, 64, **extras)
    group = sizes.H * sizes.P // options.groups
    norm = SimpleNamespace(weight=weights.norm_W, variance_epsilon=options.eps, group_size=group)
    return norm_reference(norm, scanned.flatten(2), gate).to(projected.dtype)


def _sizes(projected: torch.Tensor, weights: Mamba2Weights, options: Mamba2Options) -> Sizes:
    (B, S, _), P, G = projected.shape, options.head_dim, options.groups
    return Sizes(B, S, len(weights.D_H), P, G, (len(weights.conv_K4) - len(weights.norm_W)) // (2 * G))


def _parts(projected: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Split `projected` into views gate, xbc and dt."""
    width = sizes.H * sizes.P
    return projected.split([width, width + 2 * sizes.G * sizes.N, sizes.H], dim=-1)


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: torch.Tensor, options: Mamba2Options, start: torch.Tensor | None,
        mask: torch.Tensor | None, *weights: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        projected, w = unit_stride(projected), Mamba2Weights(*weights)  # type: ignore[arg-type]
        ctx.options, ctx.sizes = options, _sizes(projected, w, options)
        gate, xbc, dt = _parts(projected, ctx.sizes)
        xbc = nemotron_h.apply_mask_to_padding_states(conv_forward(xbc, w.conv_K4, w.conv_bias_K, start), mask)
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
        xbc_out = nemotron_h.apply_mask_to_padding_states(conv_forward(xbc, w.conv_K4, w.conv_bias_K, start), mask)
        dxbc_out = torch.empty_like(xbc_out)
        dA, d_dt_bias, dD = ssd_backward(
            xbc_out, dt, w.A_H, w.D_H, w.dt_bias_H, start, sizes, options.dt_limit, dscanned, dxbc_out, ddt
        )
        dconv = conv_backward(
            xbc, w.conv_K4, w.conv_bias_K, start, nemotron_h.apply_mask_to_padding_states(dxbc_out, mask), dxbc
        )
        small = dA.to(w.A_H.dtype), dD.to(w.D_H.dtype), d_dt_bias.to(w.dt_bias_H.dtype)
        return dprojected, None, None, None, *dconv, *small, dnorm


def _mamba2_triton(
    projected: torch.Tensor, weights: Mamba2Weights, options: Mamba2Options, start: Any = None, mask: Any = None
) -> torch.Tensor:
    return _Mamba2.apply(projected, options, start, mask, *weights)


mamba2 = graph_break(mamba2_reference)(triton_or_reference(_mamba2_triton, mamba2_reference))
