"""Depthwise causal convolution over four tokens with bias and SiLU, as before Mamba2's scan.

    z[t] = bias + w[3] x[t] + w[2] x[t-1] + w[1] x[t-2] + w[0] x[t-3]          y[t] = z[t] * sigmoid(z[t])

Channels are the last dimension, as in the output of the projection before it, so nothing is transposed. x may be a
slice of that output. In packed rows a tap that would cross the start of its document reads zero.

A program processes a block of channels and iterates over a block of tokens. It holds the previous three tokens in
registers, so every element is read once. Backward recomputes z. The gradients of weight and bias are summed per program
and then over programs in a fixed order, so they are deterministic.

Letters: B sequences, S tokens, C channels.
"""

from typing import Any

import torch

from expertmesh.backends import tl, triton
from expertmesh.kernels.launch import fast_jit
from expertmesh.kernels.rms_norm import sum_partials, unit_stride

#: rows (tokens) and channels per program. With 256 * num_warps channels a thread loads 16 bytes of bfloat16.
TUNING = {
    "forward": {"rows": 64, "channels": 512, "num_warps": 4},
    "backward": {"rows": 64, "channels": 256, "num_warps": 2},
}


@triton.jit
def _rows(ptr, row, S, stride, cols, C, NUM: tl.constexpr):
    """Load NUM tokens of one sequence, beginning at `row`; zeros before its start and after its end."""
    rows = ()
    for i in tl.static_range(NUM):
        inside = cols < tl.where((row + i >= 0) & (row + i < S), C, 0)
        rows = rows + (tl.load(ptr + (row + i) * stride + cols, inside, other=0.0),)  # type: ignore[assignment]
    return rows


@triton.jit
def _position(start_ptr, row, S, PACKED: tl.constexpr):
    """Return the token's position in its document. Only packed rows need it: `_rows` pads a sequence with zeros."""
    return row - tl.load(start_ptr + row, row < S, other=0) if PACKED else row


@triton.jit
def _tap(value, position, lag: tl.constexpr, PACKED: tl.constexpr):
    """Return `value` in float32, or zero if the tap `lag` tokens back crosses the start of the document."""
    value = value.to(tl.float32)
    return tl.where(position >= lag, value, 0.0) if PACKED else value


@triton.jit
def _z(x3, x2, x1, x0, weights, position, PACKED: tl.constexpr):
    w0, w1, w2, w3, bias = weights
    z = bias + w3 * x0.to(tl.float32) + w2 * _tap(x1, position, 1, PACKED)
    return z + w1 * _tap(x2, position, 2, PACKED) + w0 * _tap(x3, position, 3, PACKED)


@triton.jit
def _weights(weight_ptr, bias_ptr, cols, mask):
    """Load w[0] to w[3] and the bias of the channels `cols`."""
    weights = ()
    for i in tl.static_range(4):
        weight = tl.load(weight_ptr + cols * 4 + i, mask, other=0.0).to(tl.float32)
        weights = weights + (weight,)  # type: ignore[assignment]
    bias = tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32) if bias_ptr is not None else tl.zeros_like(weight)
    return weights + (bias,)


@fast_jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, start_ptr, y_ptr, S, C, blocks, stride_xb, stride_xs, stride_yb, stride_ys,
    PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y. Each iteration processes four tokens and prefetches the next four."""
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    row = (tl.program_id(1) % blocks).to(tl.int64) * ROWS
    end = tl.minimum(row + ROWS, S)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += batch * stride_xb
    y_ptr += batch * stride_yb
    start_ptr += batch * S
    weights = _weights(weight_ptr, bias_ptr, cols, cols < C)
    a, b, c, x0, x1, x2, x3 = _rows(x_ptr, row - 3, S, stride_xs, cols, C, 7)
    while row < end:
        next0, next1, next2, next3 = _rows(x_ptr, row + 4, end, stride_xs, cols, C, 4)
        x = (a, b, c, x0, x1, x2, x3)
        for i in tl.static_range(4):
            z = _z(x[i], x[i + 1], x[i + 2], x[i + 3], weights, _position(start_ptr, row + i, S, PACKED), PACKED)
            tl.store(y_ptr + (row + i) * stride_ys + cols, z * tl.sigmoid(z), cols < tl.where(row + i < end, C, 0))
        a, b, c, x0, x1, x2, x3 = x1, x2, x3, next0, next1, next2, next3
        row += 4


@fast_jit
def _backward(
    x_ptr, weight_ptr, bias_ptr, start_ptr, dy_ptr, dx_ptr, partial_ptr, S, C, blocks,
    stride_xb, stride_xs, stride_dyb, stride_dys, stride_dxb, stride_dxs,
    PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dx, and sums for the gradients of weight and bias to this program's row of partial [programs, 5, C].

    Each iteration processes two tokens and prefetches the next two. The loop reads three tokens past the block to
    complete its last dx. dx1 to dx3 accumulate dx of the tokens 1 to 3 back; dx3 is complete at each token.
    """
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    first = (tl.program_id(1) % blocks).to(tl.int64) * ROWS
    end = tl.minimum(first + ROWS, S)
    later = tl.minimum(S, end + 3)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += batch * stride_xb
    dy_ptr += batch * stride_dyb
    dx_ptr += batch * stride_dxb
    start_ptr += batch * S
    weights = _weights(weight_ptr, bias_ptr, cols, cols < C)
    sum0 = tl.zeros((BLOCK_C,), tl.float32)
    sum1, sum2, sum3, sum_bias, dx1, dx2, dx3 = sum0, sum0, sum0, sum0, sum0, sum0, sum0
    a, b, c, x0, x1 = _rows(x_ptr, first - 3, S, stride_xs, cols, C, 5)
    dy0, dy1 = _rows(dy_ptr, first, S, stride_dys, cols, C, 2)
    for step in range(0, ROWS + 3, 2):
        row = first + step
        next_x0, next_x1 = _rows(x_ptr, row + 2, later, stride_xs, cols, C, 2)
        next_dy0, next_dy1 = _rows(dy_ptr, row + 2, later, stride_dys, cols, C, 2)
        x, dy = (a, b, c, x0, x1), (dy0, dy1)
        for i in tl.static_range(2):
            position = _position(start_ptr, row + i, S, PACKED)
            z = _z(x[i], x[i + 1], x[i + 2], x[i + 3], weights, position, PACKED)
            sigmoid = tl.sigmoid(z)
            dz = dy[i].to(tl.float32) * (sigmoid + z * sigmoid * (1.0 - sigmoid))
            dx3 += weights[0] * _tap(dz, position, 3, PACKED)
            width = tl.where((row + i - 3 >= first) & (row + i - 3 < end), C, 0)
            tl.store(dx_ptr + (row + i - 3) * stride_dxs + cols, dx3, cols < width)
            block_dz = tl.where(row + i < end, dz, 0.0)  # the next program sums tokens from `end` on
            sum0 += block_dz * _tap(x[i], position, 3, PACKED)
            sum1 += block_dz * _tap(x[i + 1], position, 2, PACKED)
            sum2 += block_dz * _tap(x[i + 2], position, 1, PACKED)
            sum3 += block_dz * x[i + 3].to(tl.float32)
            sum_bias += block_dz
            dx3 = dx2 + weights[1] * _tap(dz, position, 2, PACKED)
            dx2 = dx1 + weights[2] * _tap(dz, position, 1, PACKED)
            dx1 = weights[3] * dz
        a, b, c, x0, x1, dy0, dy1 = c, x0, x1, next_x0, next_x1, next_dy0, next_dy1
    partial_ptr += tl.program_id(1) * 5 * C + cols
    sums = (sum0, sum1, sum2, sum3, sum_bias)
    for i in tl.static_range(5):
        tl.store(partial_ptr + i * C, sums[i], cols < C)


def _launch(
    kernel: Any, tuning: dict[str, int], x_BSC: torch.Tensor, weight_C4: torch.Tensor, bias_C: torch.Tensor | None,
    start_BS: torch.Tensor | None, *others: torch.Tensor,
) -> None:  # fmt: skip
    """others: the kernel's other tensors, [B, S, C] or partial sums. Without starts x is a placeholder, never read."""
    (B, S, C), weight = x_BSC.shape, weight_C4.contiguous()
    blocks, channels = triton.cdiv(S, tuning["rows"]), min(tuning["channels"], triton.next_power_of_2(C))
    kernel[(triton.cdiv(C, channels), B * blocks)](
        x_BSC, weight, bias_C, x_BSC if start_BS is None else start_BS, *others,
        S, C, blocks, *(n for x in (x_BSC, *others) if x.dim() == 3 for n in x.stride()[:2]),
        PACKED=start_BS is not None, ROWS=tuning["rows"], BLOCK_C=channels,
        num_warps=tuning["num_warps"],
    )  # fmt: skip


def conv_forward(
    x_BSC: torch.Tensor, weight_C4: torch.Tensor, bias_C: torch.Tensor | None, start_BS: torch.Tensor | None
) -> torch.Tensor:
    """Return y, contiguous. x: stride 1 over channels, may be a slice of a wider tensor. start: for packed rows
    `documents.document_starts`, else None."""
    y = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
    _launch(_forward, TUNING["forward"], x_BSC, weight_C4, bias_C, start_BS, y)
    return y


def conv_backward(
    x_BSC: torch.Tensor, weight_C4: torch.Tensor, bias_C: torch.Tensor | None, start_BS: torch.Tensor | None,
    dy_BSC: torch.Tensor, dx_BSC: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Write dx, which may be a slice of a wider tensor, and return (dweight, dbias). Inputs as of `conv_forward`."""
    (B, S, C), tuning = x_BSC.shape, TUNING["backward"]
    programs = B * triton.cdiv(S, tuning["rows"])
    partial = torch.empty(programs, 5 * C, dtype=torch.float32, device=x_BSC.device)
    _launch(_backward, tuning, x_BSC, weight_C4, bias_C, start_BS, unit_stride(dy_BSC), dx_BSC, partial)
    sums = torch.empty(5, C, dtype=torch.float32, device=x_BSC.device)
    sum_partials(partial, programs, sums)
    return sums[:4].t().to(weight_C4.dtype), sums[4].to(bias_C.dtype) if bias_C is not None else None
