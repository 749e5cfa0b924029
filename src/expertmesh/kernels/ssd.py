"""Mamba2's scan (SSD, arXiv:2405.21060), chunk by chunk on tensor cores; its backward is in `ssd_backward`.

    dt[t] = clamp(softplus(dt_raw[t] + dt_bias))                       one per head
    state[t] = exp(dt[t] A) state[t-1] + dt[t] x[t] B[t]^T             [P, N] per head; B, C are shared by a group
    y[t] = state[t] C[t] + D x[t]

With c[t] the sum of dt A from the chunk's first token to t, and S the state before the chunk,

    y[t] = sum_{s <= t} (C[t] . B[s]) exp(c[t] - c[s]) dt[s] x[s]  +  exp(c[t]) S C[t]  +  D x[t]

Three launches: `_prepare` (dt, c); `_walk`, which goes over a sequence's chunks with the state in registers and leaves
the state before each chunk in memory; `_outputs`, all chunks at once. A program of the last serves a group of heads:
C B^T is made once and stays in registers while the heads pass. Products are in x's dtype with float32 sums; dt, decays
and the running state are float32; the stored states are in x's dtype.

Packed rows: `start` holds for each token where its document starts. Weights across a start are zero, and a state
is carried through a chunk only if no document starts in it.

Letters: B sequences, S tokens, H heads, P head width, G groups, N state width, K = H P + 2 G N channels; in a kernel
Q tokens of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from expertmesh.backends import use_triton
from expertmesh.kernels.ssd_backward import ssd_backward
from expertmesh.kernels.ssd_forward import Sizes, split, ssd_forward


def ssd_scan(
    xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, D_H: torch.Tensor, dt_bias_H: torch.Tensor,
    *, head_dim: int, groups: int, dt_limit: tuple[float, float] = (0.0, float("inf")),
    start_BS: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y [B, S, H * P] in xbc's dtype; differentiable once in xbc, dt, A, D and dt_bias.

    xbc: [B, S, H P + 2 G N], x, B and C side by side as the convolution leaves them, so that their gradients are
    written side by side too; dt: [B, S, H], before bias and softplus; A [H] negative, `-exp(A_log)`; D, dt_bias: [H];
    start: [B, S] int32 for packed rows (`causal_conv.document_starts`). Must equal `mamba2_chunk_scan` of
    Transformers' nemotron_h with dt_softplus, document by document. Raises ValueError for sizes that the kernels do
    not have: head width and state width must be powers of two from 16 on.
    """
    sizes = sizes_of(xbc_BSK, dt_BSH, head_dim, groups)
    if use_triton(xbc_BSK):
        if min(sizes.P, sizes.N) < 16 or sizes.P & (sizes.P - 1) or sizes.N & (sizes.N - 1):
            raise ValueError(
                f"Mamba2's kernels need a head width and a state width that are powers of two from 16 on, not"
                f" {sizes.P} and {sizes.N}: load the model with fused={{'mamba2': False}}."
            )
        return _SSD.apply(xbc_BSK, dt_BSH, A_H, D_H, dt_bias_H, start_BS, sizes, dt_limit)
    x, B, C = split(xbc_BSK, sizes)
    return ssd_reference(x, dt_BSH, A_H, B, C, D_H, dt_bias_H, dt_limit=dt_limit, start_BS=start_BS).flatten(2)


def sizes_of(xbc_BSK: torch.Tensor, dt_BSH: torch.Tensor, head_dim: int, groups: int) -> Sizes:
    """What the shapes say; ValueError where they do not belong together."""
    B, S, H = dt_BSH.shape
    N = (xbc_BSK.shape[2] - H * head_dim) // (2 * groups)
    if N <= 0 or H % groups or xbc_BSK.shape != (B, S, H * head_dim + 2 * groups * N):
        raise ValueError(
            f"xbc {tuple(xbc_BSK.shape)} is not x, B and C of {H} heads of width {head_dim} in {groups} groups"
            f" for dt {tuple(dt_BSH.shape)}."
        )
    return Sizes(B, S, H, head_dim, groups, N)


def ssd_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, *, dt_limit: tuple[float, float] = (0.0, float("inf")),
    start_BS: torch.Tensor | None = None, chunk: int = 128,
) -> torch.Tensor:  # fmt: skip
    """The specification, in float32: x [B, S, H, P], dt [B, S, H], A, D, dt_bias [H], B and C [B, S, G, N] → y as x.

    One chunk after the other, so that no more than one chunk's weights exist at a time.
    """
    heads, groups, dtype = x.shape[2], B.shape[2], x.dtype
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    x, B, C = x.float(), B.float(), C.float()
    xg = x.unflatten(2, (groups, heads // groups))
    state = x.new_zeros(*xg.shape[:1], *xg.shape[2:], B.shape[3])
    if start_BS is None:
        start_BS = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
    token = torch.arange(x.shape[1], device=x.device)
    outputs = []
    for first in range(0, x.shape[1], chunk):
        at = slice(first, min(first + chunk, x.shape[1]))
        start, s = start_BS[:, at], token[at]
        c = (dt[:, at] * A.float()).cumsum(1).unflatten(2, (groups, -1))
        dtx = dt[:, at].unflatten(2, (groups, -1)).unsqueeze(-1) * xg[:, at]
        legal = (s[:, None] >= s) & (s >= start[:, :, None])
        difference = (c[:, :, None] - c[:, None]).masked_fill(~legal[..., None, None], -torch.inf)
        weights = torch.einsum("btgn,bsgn->btsg", C[:, at], B[:, at]).unsqueeze(-1) * difference.exp()
        y = torch.einsum("btsgh,bsghp->btghp", weights, dtx)
        entering = c.exp() * (start < first)[..., None, None]
        y = y + torch.einsum("btgn,bghpn,btgh->btghp", C[:, at], state, entering)
        outputs.append(y.flatten(2, 3) + D.float()[:, None] * x[:, at])
        leaving = (c[:, -1:] - c).exp() * (s >= start[:, -1:])[..., None, None]
        state = state * entering[:, -1, :, :, None, None]
        state = state + torch.einsum("bsgn,bsghp,bsgh->bghpn", B[:, at], dtx, leaving)
    return torch.cat(outputs, 1).to(dtype) if outputs else x.to(dtype)


class _SSD(torch.autograd.Function):
    """xbc, dt, A, D, dt_bias → y; keeps nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, xbc: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, D: torch.Tensor, dt_bias: torch.Tensor,
        start: torch.Tensor | None, sizes: Sizes, dt_limit: tuple[float, float],
    ) -> torch.Tensor:  # fmt: skip
        start = start.to(torch.int32).contiguous() if start is not None else None
        ctx.save_for_backward(xbc, dt, A, D, dt_bias, start)
        ctx.sizes, ctx.dt_limit = sizes, dt_limit
        return ssd_forward(xbc, dt, A, D, dt_bias, start, sizes, dt_limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        xbc, dt, A, D, dt_bias, start = ctx.saved_tensors
        dxbc = torch.empty(xbc.shape, dtype=xbc.dtype, device=xbc.device)
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
        if not ctx.sizes.B * ctx.sizes.S:
            return dxbc, ddt, *map(torch.zeros_like, (A, D, dt_bias)), None, None, None
        dA, dbias, dD = ssd_backward(xbc, dt, A, D, dt_bias, start, ctx.sizes, ctx.dt_limit, dy, dxbc, ddt)
        return dxbc, ddt, dA.to(A.dtype), dD.to(D.dtype), dbias.to(dt_bias.dtype), None, None, None
