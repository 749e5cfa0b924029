"""The activations of dense MLPs and shared experts: SwiGLU on two tensors, silu(gate) * up, and relu(x)^2 on one.

    y = gate * sigmoid(gate) * up

One pass forward (two reads, one write) and one backward (three reads, two writes); only gate and up are kept. Stock
Transformers computes silu in the input's dtype, rounds, and multiplies; the kernel computes in float32 and rounds once,
so in bfloat16 it is closer to the exact value and not bit-equal to stock. Routed experts have the same activation
inside their GEMM instead. relu(x)^2 and its gradient 2 relu(x) dy are bit-equal to stock's, in one pass each.

Letters: T rows, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from expertmesh.backends import tl, triton, use_triton
from expertmesh.kernels.launch import launched
from expertmesh.kernels.rms_norm import channels_last

#: elements per program, and warps: two or one 16-byte loads of bfloat16 per thread and tensor
TUNING = {"forward": {"elements": 2048, "num_warps": 4}, "backward": {"elements": 1024, "num_warps": 4}}


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, differentiable in both. gate, up: [..., W], same shape and dtype, any strides. Returns [..., W].

    Must equal `act_fn(gate) * up` of a Transformers MLP with hidden_act "silu".
    """
    assert gate.shape == up.shape and gate.dtype == up.dtype
    return _Activation.apply(gate, up) if use_triton(gate) else swiglu_reference(gate, up)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The specification: Transformers' two operations."""
    return F.silu(gate) * up


@triton.jit
def _offsets(T, W, COL_BLOCKS, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows [BLOCK_T, 1] and columns [1, BLOCK_W] of this program's tile, and which of its elements exist."""
    pid = tl.program_id(0)
    row_block = pid // COL_BLOCKS  # divided in 32 bits: in 64 it takes longer than all the rest
    rows = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    cols = (pid - row_block * COL_BLOCKS).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    return rows, cols, (rows < T) & (cols < W)


@launched
def _forward(
    gate_ptr, up_ptr, y_ptr, T, W, COL_BLOCKS, stride_gate, stride_up, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr
):
    rows, cols, mask = _offsets(T, W, COL_BLOCKS, BLOCK_T, BLOCK_W)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * W + cols, gate * tl.sigmoid(gate) * up, mask)


@launched
def _backward(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, T, W, COL_BLOCKS, stride_gate, stride_up, stride_dy,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _offsets(T, W, COL_BLOCKS, BLOCK_T, BLOCK_W)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dup_ptr + rows * W + cols, dy * silu, mask)
    tl.store(dgate_ptr + rows * W + cols, dy * up * (sigmoid + silu * (1.0 - sigmoid)), mask)


def _launch(
    kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], elements: int, num_warps: int
) -> None:
    """Runs an elementwise kernel over [..., W] inputs and contiguous outputs; all contiguous means one long row."""
    if all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.view(1, -1) for x in inputs)
    else:
        inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
        inputs = tuple(map(channels_last, inputs))
    T, W = inputs[0].shape
    block_w = min(elements, triton.next_power_of_2(max(1, W)))
    block_t = elements // block_w
    col_blocks = triton.cdiv(W, block_w)
    programs = triton.cdiv(T, block_t) * col_blocks
    if programs:
        kernel[(programs,)](
            *inputs, *outputs, T, W, col_blocks, *(x.stride(0) for x in inputs),
            BLOCK_T=block_t, BLOCK_W=block_w, num_warps=num_warps,
        )  # fmt: skip


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2, differentiable; x: [..., W], any strides. Must equal "relu2" of Transformers' ACT2FN."""
    return _Activation.apply(x) if use_triton(x) else F.relu(x).square()


@launched
def _relu2_forward(x_ptr, y_ptr, T, W, COL_BLOCKS, stride_x, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    rows, cols, mask = _offsets(T, W, COL_BLOCKS, BLOCK_T, BLOCK_W)
    x = tl.load(x_ptr + rows * stride_x + cols, mask, other=0.0).to(tl.float32)
    x = tl.where(x < 0, 0.0, x)  # nan stays nan
    tl.store(y_ptr + rows * W + cols, x * x, mask)


@launched
def _relu2_backward(
    x_ptr, dy_ptr, dx_ptr, T, W, COL_BLOCKS, stride_x, stride_dy, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr
):
    rows, cols, mask = _offsets(T, W, COL_BLOCKS, BLOCK_T, BLOCK_W)
    x = tl.load(x_ptr + rows * stride_x + cols, mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows * W + cols, tl.where(x <= 0, 0.0, 2.0 * x * dy), mask)


class _Activation(torch.autograd.Function):
    """y of one input (relu2) or two (SwiGLU), all of one shape and dtype."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        y = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
        _launch(_forward if len(inputs) == 2 else _relu2_forward, inputs, (y,), **TUNING["forward"])
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
        _launch(_backward if len(inputs) == 2 else _relu2_backward, (*inputs, dy), grads, **TUNING["backward"])
        return grads
