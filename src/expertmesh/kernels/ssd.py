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
