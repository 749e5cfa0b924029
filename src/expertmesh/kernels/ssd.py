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

import torch
import torch.nn.functional as F


def ssd_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, *, dt_limit: tuple[float, float] = (0.0, float("inf")),
    start_BS: torch.Tensor | None = None, chunk: int = 64,
) -> torch.Tensor:  # fmt: skip
    """The specification, in float32: x [B, S, H, P], dt [B, S, H], A, D, dt_bias [H], B and C [B, S, G, N] → y as x.

    Must equal `mamba2_chunk_scan` of Transformers' nemotron_h with dt_softplus, document by document. One chunk after
    the other, so that no more than one chunk's weights exist at a time.
    """
    (num_rows, S, heads, P), (groups, N) = x.shape, B.shape[2:]
    per_group = heads // groups
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    decay_BGhS = (dt * A.float()).transpose(1, 2).unflatten(1, (groups, per_group))
    dtx_BGShP = (dt.unsqueeze(-1) * x.float()).unflatten(2, (groups, per_group)).transpose(1, 2)
    B, C = B.float().transpose(1, 2), C.float().transpose(1, 2)  # [B, G, S, N]
    state = x.new_zeros(num_rows, groups, N, per_group * P, dtype=torch.float32)
    if start_BS is None:
        start_BS = torch.zeros(num_rows, S, dtype=torch.int32, device=x.device)
    outputs = []
    for first in range(0, S, chunk):
        at = slice(first, min(first + chunk, S))
        start, s = start_BS[:, None, None, at], torch.arange(at.start, at.stop, device=x.device)
        c, dtx = decay_BGhS[..., at].cumsum(-1), dtx_BGShP[:, :, at]
        illegal = (s[:, None] < s) | (s < start.unsqueeze(-1))
        weights = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(illegal, -torch.inf).exp()
        weights = weights * (C[:, :, at] @ B[:, :, at].transpose(2, 3)).unsqueeze(2)
        y = (weights @ dtx.transpose(2, 3)).transpose(2, 3)  # [B, G, Q, h, P]
        entering = (c.exp() * (start < first)).transpose(2, 3).unsqueeze(-1)
        y = y + (C[:, :, at] @ state).unflatten(-1, (per_group, P)) * entering
        outputs.append(y.transpose(1, 2).flatten(2, 3))
        leaving = ((c[..., -1:] - c).exp() * (s >= start[..., -1:])).transpose(2, 3).unsqueeze(-1)
        state = (state.unflatten(-1, (per_group, P)) * entering[:, :, -1:]).flatten(3)
        state = state + B[:, :, at].transpose(2, 3) @ (dtx * leaving).flatten(3)
    return (torch.cat([x.new_zeros(num_rows, 0, heads, P), *outputs], 1) + D.float()[:, None] * x).to(x.dtype)
