"""The activation between an MLP's up- and down-projection, forward and backward, and kernels of it for dense MLPs.

`h_SJ` is the up-projection's output for S rows. Gated experts have J = 2I columns: gate and up, in halves or
interleaved. Others have J = I. The activation returns `a_SI`. The Triton kernels support three kinds:

    silu      a = silu(gate) * up                                      Qwen, DeepSeek, Mixtral, GLM …
    clamped   a = g·σ(αg) · (u + 1),  g = min(gate, L), u = clamp(up, -L, L)    GPT-OSS
    relu2     a = relu(h)²                                             Nemotron

Any other is `custom`: it calls the HF module's own function, and the backward differentiates a recomputation of it.

Routed experts compute this within their GEMMs. Dense MLPs and shared experts use `swiglu` and `relu2`, which read and
write memory once per direction and save only their inputs. They compute in float32 and round once. Transformers also
rounds silu(gate), so in bfloat16 `swiglu` is not bit-equal to it, but closer to the exact value.

Letters: T rows, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.recompute import mark_recomputable
from expertmesh.kernels.rms_norm import as_rows

#: per program of 4 warps: two 16-byte loads of bfloat16 per thread and tensor, or one in the backward
ELEMENTS = {"forward": 2048, "backward": 1024}


@dataclass(frozen=True)
class Activation:
    """How an experts module turns h [S, J] into a [S, I].

    kind: silu, clamped, relu2 or custom. gated: whether J = 2I; else J = I. interleaved: whether gate and up columns
    alternate. alpha, limit: constants of `clamped`. fn: the module's function, for `custom` only.
    """

    kind: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")
    fn: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, h_SJ: torch.Tensor) -> torch.Tensor:
        """Return a [S, I] for h [S, J], as the HF module's `_apply_gate` (gated) or `act_fn` does."""
        if self.kind in ("silu", "clamped"):
            gate, up = (h_SJ[..., ::2], h_SJ[..., 1::2]) if self.interleaved else h_SJ.chunk(2, dim=-1)
        if self.kind == "silu":
            return F.silu(gate) * up
        if self.kind == "clamped":
            gate = gate.clamp(max=self.limit)
            return (up.clamp(-self.limit, self.limit) + 1) * (gate * torch.sigmoid(gate * self.alpha))
        if self.kind == "relu2":
            return torch.square(F.relu(h_SJ))
        assert self.fn is not None
        return self.fn(h_SJ)


@triton.jit
def activate(gate, up, KIND: tl.constexpr, alpha, limit):
    """Return a = activation(gate, up) in float32. relu2 ignores `up`."""
    a, _, _ = activate_backward(gate, up, up, KIND, alpha, limit)
    return a


@triton.jit
def activate_backward(gate, up, da, KIND: tl.constexpr, alpha, limit):
    """Return (a, dgate, dup) in float32."""
    if KIND == "silu":
        s = tl.sigmoid(gate)
        silu = gate * s
        return silu * up, da * up * (s + silu * (1.0 - s)), da * silu
    elif KIND == "clamped":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        s = tl.sigmoid(g * alpha)
        glu = g * s
        dgate = da * (u + 1.0) * (s + alpha * glu * (1.0 - s))
        dgate = tl.where(gate <= limit, dgate, 0.0)
        dup = tl.where((up >= -limit) & (up <= limit), da * glu, 0.0)
        return (u + 1.0) * glu, dgate, dup
    else:
        r = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r, tl.where(gate <= 0.0, 0.0, da * 2.0 * r), da


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., W], differentiable in both. gate, up: same shape and dtype, any strides. Must equal
    `act_fn(gate) * up` of a Transformers MLP with hidden_act "silu".
    """
    assert gate.shape == up.shape and gate.dtype == up.dtype
    a = _Dense.apply("silu", gate, up) if use_triton(gate) else F.silu(gate) * up
    mark_recomputable((a,), lambda gate, up: (swiglu(gate, up),), gate, up)
    return a


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Return relu(x)^2, differentiable. x: [..., W], any strides. Must equal "relu2" of Transformers' ACT2FN."""
    a = _Dense.apply("relu2", x) if use_triton(x) else F.relu(x).square()
    mark_recomputable((a,), lambda x: (relu2(x),), x)
    return a


@triton.jit
def _load(ptr, rows, cols, stride, mask):
    return tl.load(ptr + rows * stride + cols, mask, other=0.0).to(tl.float32)


@fast_jit
def _dense(
    gate_ptr, up_ptr, dy_ptr, first_ptr, second_ptr, T, W, COL_BLOCKS, stride_gate, stride_up, stride_dy,
    KIND: tl.constexpr, BACK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Forward: write y to `first`. Backward: write dgate to `first` and, for silu, dup to `second`. All are [T, W]."""
    pid = tl.program_id(0)
    row_block = pid // COL_BLOCKS  # a 32-bit division: one of 64 bits takes longer than the rest of the kernel
    rows = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    cols = (pid - row_block * COL_BLOCKS).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    mask = (rows < T) & (cols < W)
    gate = _load(gate_ptr, rows, cols, stride_gate, mask)
    up = gate
    if KIND == "silu":
        up = _load(up_ptr, rows, cols, stride_up, mask)
    if BACK:
        dy = _load(dy_ptr, rows, cols, stride_dy, mask)
        _, dgate, dup = activate_backward(gate, up, dy, KIND, 1.0, 0.0)
        if KIND == "silu":
            tl.store(second_ptr + rows * W + cols, dup, mask)
        tl.store(first_ptr + rows * W + cols, dgate, mask)
    else:
        tl.store(first_ptr + rows * W + cols, activate(gate, up, KIND, 1.0, 0.0), mask)


class _Dense(torch.autograd.Function):
    """Autograd function of an activation of one input, or of two (gate, up) of the same shape and dtype."""

    @staticmethod
    def forward(ctx: Any, kind: str, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.kind = kind
        ctx.save_for_backward(*inputs)
        return _launch_dense(kind, inputs, 1, "forward")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        return None, *_launch_dense(ctx.kind, (*inputs, dy), len(inputs), "backward")


def _launch_dense(kind: str, inputs: tuple[torch.Tensor, ...], outputs: int, direction: str) -> list[torch.Tensor]:
    """Return `outputs` contiguous tensors [..., W]. Inputs that are all contiguous are treated as one long row."""
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:outputs]]
    if all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.view(1, -1) for x in inputs)
    else:
        inputs = tuple(as_rows(x) for x in inputs)
    gate, up, dy = inputs[0], inputs[1 if kind == "silu" else 0], inputs[-1]
    (T, W), elements = gate.shape, ELEMENTS[direction]
    block_w = min(elements, triton.next_power_of_2(max(1, W)))
    block_t = elements // block_w
    col_blocks = triton.cdiv(W, block_w)
    if T * W:
        _dense[(triton.cdiv(T, block_t) * col_blocks,)](
            gate, up, dy, outs[0], outs[-1], T, W, col_blocks, gate.stride(0), up.stride(0), dy.stride(0),
            KIND=kind, BACK=direction == "backward", BLOCK_T=block_t, BLOCK_W=block_w, num_warps=4,
        )  # fmt: skip
    return outs
