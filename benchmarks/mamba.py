"""Mamba2's convolution, scan and gated norm at Nemotron-3-Nano widths: errors, and times beside the floor and others.

    python benchmarks/mamba.py --out benchmarks/results/NAME.json
    python benchmarks/mamba.py --others ""      without other libraries, whose scans tune themselves for over a minute
    python benchmarks/mamba.py --sweep          every configuration of the tables that compiles, best first

`mixer` is all that a layer does between its projections, in one autograd function. Errors are against the reference in
float32 on the same bfloat16 inputs, relative to each tensor's largest value, with and without packed documents;
`seconds` is what the first call took, compiling included. The floor counts each tensor of the interface once over
4.2 TB/s (one H200 copying). Without a GPU `TRITON_INTERPRET=1 python benchmarks/mamba.py --tiny` runs it all in
float32: figures mean nothing there.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import median_ms

from expertmesh import backends
from expertmesh.bench.origin import origin, write
from expertmesh.kernels import causal_conv as conv_kernels
from expertmesh.kernels import rms_norm as norm_kernels
from expertmesh.kernels import ssd as scan_kernels
from expertmesh.kernels.causal_conv import causal_conv_reference, conv_backward, conv_forward
from expertmesh.kernels.documents import document_starts
from expertmesh.kernels.mamba2 import Mamba2Options, Mamba2Weights, mamba2, mamba2_reference
from expertmesh.kernels.rms_norm import gated_norm_backward, gated_norm_forward, gated_norm_reference
from expertmesh.kernels.ssd import Sizes, split, ssd_forward, ssd_reference
from expertmesh.kernels.ssd_backward import ssd_backward

BYTES_PER_MS = 4.2e9
EPS = 1e-5
LIMIT = 0.001, float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

#: kernel: (table, entry, configurations to try, whether it runs in forward)
SWEEPS: list[tuple[str, dict[str, Any], str, list[dict[str, int]]]] = (
    [
        (
            f"conv {name}",
            conv_kernels.TUNING,
            name,
            [
                {"rows": rows, "channels": channels, "num_warps": warps}
                for rows, (channels, warps) in itertools.product(
                    (32, 64, 128), ((256, 1), (512, 2), (256, 2), (512, 4))
                )
            ],
        )
        for name in ("forward", "backward")
    ]
    + [
        (
            f"norm {name}",
            norm_kernels.GATED_TUNING,
            name,
            [
                {"elements": elements, "per_thread": per_thread, "programs": programs}
                for elements, per_thread, programs in choices
            ],
        )
        for name, choices in {
            "forward": [(1024, 8, 1), (2048, 8, 1), (2048, 16, 1), (4096, 16, 1), (4096, 32, 1)],
            "backward": [
                (1024, 8, 4),
                (1024, 8, 8),
                (2048, 16, 4),
                (2048, 16, 8),
                (2048, 8, 4),
                (4096, 16, 2),
                (4096, 16, 4),
            ],
        }.items()
    ]
    + [
        (
            f"scan {name}",
            scan_kernels.TUNING,
            name,
            [{"BLOCK": block, "num_warps": warps, "num_stages": stages} for block, warps, stages in choices],
        )
        for name, choices in {
            "walk": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2), (32, 4, 3)],
            "outputs": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2), (128, 8, 3)],
            "inputs": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2), (128, 8, 3)],
            "gradients": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 1), (64, 8, 2)],
        }.items()
    ]
)


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


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


class Case:
    """One function with its inputs: forward and backward, timed apart."""

    def __init__(self, fn: Callable, leaves: list[torch.Tensor]) -> None:
        self.fn, self.leaves = fn, leaves
        self.y = fn(*leaves)
        self.dy = torch.randn_like(self.y)

    def forward(self) -> torch.Tensor:
        return self.fn(*self.leaves)

    def backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.y, self.leaves, self.dy, retain_graph=True)


def errors(fn: Callable, reference: Callable, leaves: list[torch.Tensor]) -> list[float]:
    """Of the output and each gradient."""
    case = Case(fn, leaves)
    got = [case.y, *case.backward()]
    exact = [x.detach().float().requires_grad_() for x in leaves]
    y = reference(*exact)
    expected = [y, *torch.autograd.grad(y, exact, case.dy.float())]
    return [float(f"{(g - e).abs().max() / e.abs().max():.2e}") for g, e in zip(got, expected, strict=True)]


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
        dA, dbias, dD = ssd_backward(xbc, dt, A, D, bias, start, sizes._replace(B=len(xbc)), LIMIT, dy, dxbc, ddt)
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
        "scan": (
            kernels(lambda *a: ssd_forward(*a, start, sizes._replace(B=len(a[0])), LIMIT), scan),
            scan_reference,
        ),
        "norm": (
            kernels(lambda *a: gated_norm_forward(*a, EPS, sizes.G), norm),
            lambda *a: gated_norm_reference(*a, EPS, sizes.G),
        ),
        "mixer": (
            lambda x, *w: mamba2(x, Mamba2Weights(*w), options, start),
            lambda x, *w: mamba2_reference(x, Mamba2Weights(*w), options, start),
        ),
    }


def imported(attribute: str, *modules: str) -> Callable | None:
    """The first of these modules' attributes that there is."""
    for name in modules if DEVICE == "cuda" else ():
        try:
            found = getattr(importlib.import_module(name), attribute, None)
        except ImportError:
            continue
        if callable(found):
            return found
    return None


def others(sizes: Sizes, asked: list[str]) -> dict[str, dict[str, Callable]]:
    """What is installed of fla-core and mamba_ssm; a line for what is not."""

    def fla_conv(fn):
        return lambda x, weight, bias: fn(x, weight, bias, activation="silu")[0]

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

    triton_ops = "mamba_ssm.ops.triton"
    known: dict[str, tuple[str, Callable, Callable | None]] = {
        "fla-conv": (
            "conv",
            fla_conv,
            imported("causal_conv1d", "fla.modules.conv", "fla.modules.causal_conv1d", "fla.modules.convolution"),
        ),
        "fla-scan": ("scan", fla_scan, imported("chunk_simple_gla", "fla.ops.simple_gla")),
        "mamba_ssm-scan": ("scan", mamba_scan, imported("mamba_chunk_scan_combined", f"{triton_ops}.ssd_combined")),
        "mamba_ssm-norm": ("norm", mamba_norm, imported("rmsnorm_fn", f"{triton_ops}.layernorm_gated")),
    }
    found: dict[str, dict[str, Callable]] = {"conv": {}, "scan": {}, "norm": {}, "mixer": {}}
    for name, (kernel, adapt, fn) in known.items():
        if fn is not None and name in asked:
            found[kernel][name] = adapt(fn)
        else:
            print(json.dumps({"skipped": name, "why": "not installed" if fn is None else "not asked for"}), flush=True)
    return found


def floors(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """ms of forward and backward."""
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
    leaves = inputs(sizes)
    cuts = torch.arange(1, 8, device=DEVICE) * (sizes.S // 8) + 5
    start = document_starts((torch.arange(sizes.S, device=DEVICE)[:, None] >= cuts).sum(1).expand(sizes.B, -1))
    for packed in (False, True):
        for name in [name for name in leaves if not (packed and name == "norm")]:
            cut = [x.detach()[:1].requires_grad_() if x.dim() == 3 else x for x in leaves[name]]
            ours, reference = functions(sizes._replace(B=1), start[:1] if packed else None)[name]
            begin = time.perf_counter()
            yield {"kernel": name, "packed": packed, "errors": errors(ours, reference, cut),
                   "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip
    theirs = others(sizes, asked)
    for packed in (False, True):
        for name, (ours, reference) in functions(sizes, start if packed else None).items():
            if packed and name == "norm":
                continue
            arms = {"expertmesh": ours} if packed else {"expertmesh": ours, "torch": reference, **theirs[name]}
            for arm, fn in arms.items():
                try:
                    yield from timed(name, packed, arm, Case(fn, leaves[name]), sizes, repeats)
                except Exception as error:  # other people's kernels: what they refuse is part of the table
                    if arm in ("expertmesh", "torch"):
                        raise
                    said = f"{type(error).__name__}: {error}".splitlines()[0][:150]
                    yield {"kernel": name, "packed": packed, "implementation": arm, "failed": said}


def timed(name: str, packed: bool, arm: str, case: Case, sizes: Sizes, repeats: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of one implementation of a kernel."""
    for direction, floor in zip(("forward", "backward"), floors(sizes)[name], strict=True):
        ms = round(median_ms(getattr(case, direction), repeats if arm != "torch" else 2), 4)
        yield {"kernel": name, "packed": packed, "implementation": arm, "pass": direction, "ms": ms,
               "floor_ms": round(floor, 4), "share_of_floor": round(floor / ms, 3)}  # fmt: skip


def sweep(sizes: Sizes, repeats: int, asked: list[str]) -> Iterator[dict[str, Any]]:
    """Times a whole pass while one kernel's configuration varies; one that needs too much of the GPU is passed over."""
    leaves, ours = inputs(sizes), functions(sizes, None)
    cases = {name: Case(ours[name][0], leaves[name]) for name in ("conv", "scan", "norm")}
    for name, tuning, entry, candidates in SWEEPS:
        case = cases[name.split()[0]]
        call = case.forward if entry in ("forward", "outputs") else case.backward
        shipped, times, failed = tuning[entry], [], []
        for candidate in candidates:
            tuning[entry] = candidate
            try:
                times.append([round(median_ms(call, repeats), 4), candidate])
            except backends.triton.runtime.errors.OutOfResources as problem:
                failed.append([str(problem), candidate])
        tuning[entry] = shipped
        yield {"kernel": name, "shipped": shipped, "best_first": sorted(times, key=lambda t: t[0]), "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--others", default="fla-conv,fla-scan,mamba_ssm-scan,mamba_ssm-norm", help="of these, by name")
    parser.add_argument("--sweep", action="store_true", help="try the configurations of the kernels' tables")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run without a GPU")
    parser.add_argument("--out", help="also write everything to this JSON file")
    parser.add_argument("--commit", help="the commit to note in it, where the source is no git checkout")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.batch, arguments.seq, 64, 64, 8, 128)
    repeats = arguments.repeats
    if arguments.tiny:
        sizes, repeats = Sizes(1, 136, 2, 16, 1, 16), 1
    result: dict[str, Any] = {
        **origin(["python", *sys.argv], arguments.commit, ("triton", "fla-core", "mamba-ssm")),
        "sizes": sizes._asdict(),
        "rows": [],
    }
    print(json.dumps(result), flush=True)
    torch.manual_seed(0)
    interpreted = backends.interpreted() if os.environ.get("TRITON_INTERPRET") == "1" else contextlib.nullcontext()
    with interpreted:
        for row in (sweep if arguments.sweep else rows)(sizes, repeats, arguments.others.split(",")):
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            write(result, arguments.out)  # a later one may fail


if __name__ == "__main__":
    main()
