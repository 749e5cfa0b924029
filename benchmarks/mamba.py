"""Mamba2's convolution, scan and gated norm at Nemotron-3-Nano widths: ours, PyTorch's and other libraries'.

    python benchmarks/mamba.py --out benchmarks/results/h200_mamba.json
    python benchmarks/mamba.py --others ""      without other libraries, whose scans tune themselves for over a minute

`mixer` is all that a layer does between its projections. The floor counts each tensor of the interface once, at the
4.2 TB/s that one H200 copies with. Without a GPU `TRITON_INTERPRET=1 python benchmarks/mamba.py --tiny` tries it.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, attempt, forward_backward, interpreted, leaf, parser

from expertmesh.kernels.causal_conv import causal_conv_reference, conv_backward, conv_forward
from expertmesh.kernels.documents import document_starts
from expertmesh.kernels.mamba2 import Mamba2Options, Mamba2Weights, mamba2, mamba2_reference
from expertmesh.kernels.rms_norm import gated_norm_backward, gated_norm_forward, gated_norm_reference
from expertmesh.kernels.ssd import Sizes, split, ssd_forward, ssd_reference
from expertmesh.kernels.ssd_backward import ssd_backward

BYTES_PER_MS = 4.2e9
EPS = 1e-5
LIMIT = 0.001, float("inf")
OTHERS = "fla-conv,fla-scan,mamba_ssm-scan,mamba_ssm-norm"


class Autograd(torch.autograd.Function):
    """y = forward(*inputs), gradients = backward(dy, *inputs): a pair of kernels as one function."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.kernels = backward
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return None, None, *ctx.kernels(dy, *ctx.saved_tensors)


def inputs(sizes: Sizes) -> dict[str, list[torch.Tensor]]:
    """Leaves of each kernel; dt as a trained model has it: between 0.001 and 0.1."""
    inner = sizes.H * sizes.P
    channels = inner + 2 * sizes.G * sizes.N
    conv = [leaf(channels, 4, scale=0.5), leaf(channels)]
    A = -torch.arange(1, sizes.H + 1, device=DEVICE, dtype=torch.float32)
    small = [A.requires_grad_(), leaf(sizes.H), (leaf(sizes.H) - 4).detach().requires_grad_()]
    rows = sizes.B, sizes.S
    return {
        "conv": [leaf(*rows, channels), *conv],
        "scan": [leaf(*rows, channels, scale=0.3), leaf(*rows, sizes.H), *small],
        "norm": [leaf(*rows, inner), leaf(*rows, inner), leaf(inner)],
        "mixer": [leaf(*rows, inner + channels + sizes.H), *conv, *small, leaf(inner)],
    }


def functions(sizes: Sizes, start: torch.Tensor | None) -> dict[str, tuple[Callable, Callable]]:
    """(ours, reference) of each."""
    options = Mamba2Options(sizes.P, sizes.G, LIMIT, EPS)

    def conv(dy, x, weight, bias):
        dx = torch.empty_like(x)
        return dx, *conv_backward(x, weight, bias, start, dy, dx)

    def scan(dy, xbc, dt, A, D, bias):
        dxbc, ddt = torch.empty_like(xbc), torch.empty_like(dt)
        dA, dbias, dD = ssd_backward(xbc, dt, A, D, bias, start, sizes, LIMIT, dy, dxbc, ddt)
        return dxbc, ddt, dA, dD, dbias

    def scan_reference(xbc, dt, A, D, bias):
        x, B, C = split(xbc, sizes)
        return ssd_reference(x, dt, A, B, C, D, bias, dt_limit=LIMIT, start_BS=start).flatten(2)

    def norm(dy, x, gate, weight):
        dgate = torch.empty_like(gate)
        dx, dweight = gated_norm_backward(x, gate, weight, EPS, sizes.G, dy, dgate)
        return dx, dgate, dweight

    def kernels(forward: Callable, backward: Callable) -> Callable:
        return lambda *leaves: Autograd.apply(forward, backward, *leaves)

    return {
        "conv": (kernels(lambda *a: conv_forward(*a, start), conv), lambda *a: causal_conv_reference(*a, start)),
        "scan": (kernels(lambda *a: ssd_forward(*a, start, sizes, LIMIT), scan), scan_reference),
        "norm": (
            kernels(lambda *a: gated_norm_forward(*a, EPS, sizes.G), norm),
            lambda *a: gated_norm_reference(*a, EPS, sizes.G),
        ),
        "mixer": (
            lambda x, *w: mamba2(x, Mamba2Weights(*w), options, start),
            lambda x, *w: mamba2_reference(x, Mamba2Weights(*w), options, start),
        ),
    }


def others(sizes: Sizes, asked: list[str]) -> dict[str, dict[str, Callable]]:
    """For each kernel what is asked for of fla-core and mamba_ssm; an error for what is not installed."""

    def fla_scan(fn):
        """Their scan has no groups, no dt and no D: what makes those is part of the time, as it would be in a model."""

        def scan(xbc, dt, A, D, bias):
            x, B, C = split(xbc, sizes)
            dt = torch.nn.functional.softplus(dt.float() + bias.float()).clamp(*LIMIT)
            B, C = (t.repeat_interleave(sizes.H // sizes.G, 2) for t in (B, C))
            y = fn(C, B, (x * dt.unsqueeze(-1)).to(x.dtype), dt * A, scale=1.0)[0]
            return (y + D[:, None] * x).flatten(2)

        return scan

    def mamba_scan(fn):
        def scan(xbc, dt, A, D, bias):
            x, B, C = split(xbc, sizes)
            return fn(x, dt, A, B, C, 128, D=D, dt_bias=bias, dt_softplus=True, dt_limit=LIMIT).flatten(2)

        return scan

    def mamba_norm(fn):
        group = sizes.H * sizes.P // sizes.G
        return lambda x, gate, w: fn(x, w, None, z=gate, eps=EPS, group_size=group, norm_before_gate=False)

    def fla_conv(fn):
        return lambda x, weight, bias: fn(x, weight, bias, activation="silu")[0]

    known: dict[str, tuple[str, Callable, str, str]] = {
        "fla-conv": ("conv", fla_conv, "fla.modules.conv", "causal_conv1d"),
        "fla-scan": ("scan", fla_scan, "fla.ops.simple_gla", "chunk_simple_gla"),
        "mamba_ssm-scan": ("scan", mamba_scan, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
        "mamba_ssm-norm": ("norm", mamba_norm, "mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn"),
    }
    found: dict[str, dict[str, Callable]] = {"conv": {}, "scan": {}, "norm": {}, "mixer": {}}
    for name in asked:
        kernel, adapt, module, attribute = known[name]
        found[kernel][name] = adapt(getattr(importlib.import_module(module), attribute))
    return found


def floors(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and backward."""
    inner, heads = sizes.H * sizes.P, sizes.H
    channels = inner + 2 * sizes.G * sizes.N
    byte = 2 * sizes.B * sizes.S / BYTES_PER_MS
    projected = inner + channels + heads
    widths = {
        "conv": (2 * channels, 3 * channels),
        "scan": (channels + inner + heads, 2 * channels + inner + 2 * heads),
        "norm": (3 * inner, 5 * inner),
        "mixer": (projected + inner, 2 * projected + inner),
    }
    return {name: (forward * byte, backward * byte) for name, (forward, backward) in widths.items()}


def rows(sizes: Sizes, repeats: int, asked: list[str]) -> Iterator[dict[str, Any]]:
    leaves, theirs = inputs(sizes), others(sizes, asked)
    cuts = torch.arange(1, 8, device=DEVICE) * (sizes.S // 8) + 5
    start = document_starts((torch.arange(sizes.S, device=DEVICE)[:, None] >= cuts).sum(1).expand(sizes.B, -1))
    for packed in (False, True):
        for name, (ours, reference) in functions(sizes, start if packed else None).items():
            if packed and name == "norm":
                continue
            arms = {"expertmesh": ours} if packed else {"expertmesh": ours, "torch": reference, **theirs[name]}
            for arm, fn in arms.items():
                row = {"kernel": name, "packed": packed, "implementation": arm}
                args = fn, leaves[name], 2 if arm == "torch" else repeats
                times = attempt(lambda args=args: forward_backward(*args), arm in ("expertmesh", "torch"))
                if "failed" in times:
                    yield row | times
                    continue
                for direction, floor in zip(("forward", "backward"), floors(sizes)[name], strict=True):
                    ms = times[direction][0]
                    floor_ms, share = round(floor, 4), round(floor / ms, 3)
                    yield {**row, "pass": direction, "ms": round(ms, 4), "floor_ms": floor_ms, "share_of_floor": share}


def main() -> None:
    options = parser(__doc__, repeats=10)
    options.add_argument(
        "--others", default=OTHERS if DEVICE == "cuda" else "", help="other libraries' kernels, by name"
    )
    options = options.parse_args()
    sizes = Sizes(1, 136, 2, 16, 1, 16) if options.tiny else Sizes(4, 4096, 64, 64, 8, 128)
    result = Result(options, ("triton", "fla-core", "mamba-ssm"), sizes=sizes._asdict(), dtype=str(DTYPE))
    torch.manual_seed(0)
    with interpreted():
        for row in rows(sizes, options.repeats, [name for name in options.others.split(",") if name]):
            result.add(row)


if __name__ == "__main__":
    main()
