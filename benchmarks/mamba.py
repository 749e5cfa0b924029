"""Mamba2's causal convolution and scan at Nemotron-3-Nano widths: errors, and times beside the floor and others.

    python benchmarks/mamba.py --out benchmarks/results/NAME.json
    python benchmarks/mamba.py --sweep          every configuration of the tables that compiles, best first

Errors are against the reference in float32 on the same bfloat16 inputs, relative to each tensor's largest value, with
and without packed documents. The floor counts each tensor of the interface once over 4.25 TB/s (one H200 copying).
fla-core's convolution and mamba_ssm's scan take part where they can be imported; torch is the reference here. Without a
GPU `TRITON_INTERPRET=1 python benchmarks/mamba.py --tiny` runs it all in float32: figures mean nothing there.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from expertmesh import backends
from expertmesh.kernels import causal_conv as conv_kernels
from expertmesh.kernels import ssd_forward as scan_kernels
from expertmesh.kernels.causal_conv import causal_conv, causal_conv_reference, document_starts
from expertmesh.kernels.ssd import ssd_reference, ssd_scan
from expertmesh.kernels.ssd_forward import Sizes, split

BYTES_PER_MS = 4.25e9
LIMIT = 0.001, float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

#: kernel: (table, entry, configurations to try, whether it runs in forward)
SWEEPS: list[tuple[str, dict[str, Any], str, list[dict[str, int]]]] = [
    (
        f"conv {name}",
        conv_kernels.TUNING,
        name,
        [
            {"rows": rows, "channels": channels, "num_warps": warps}
            for rows, (channels, warps) in itertools.product((32, 64, 128), ((256, 1), (512, 2), (256, 2), (512, 4)))
        ],
    )
    for name in ("forward", "backward")
] + [
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


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def median_ms(fn: Callable[[], Any], repeats: int) -> float:
    """Median time of one call behind writes that empty the L2 cache and hide the launches."""
    flush = torch.empty(2**28 if DEVICE == "cuda" else 1, dtype=torch.int8, device=DEVICE)
    times = []
    for i in range(repeats + 2):
        for _ in range(8 if DEVICE == "cuda" else 0):
            flush.zero_()
        if DEVICE == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            fn()
            elapsed = (time.perf_counter() - begin) * 1e3
        if i >= 2:
            times.append(elapsed)
    return round(statistics.median(times), 4)


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


def inputs(sizes: Sizes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Leaves of the convolution and of the scan; dt as a trained model has it: between 0.001 and 0.1."""
    channels = sizes.H * sizes.P + 2 * sizes.G * sizes.N
    conv = [leaf(sizes.B, sizes.S, channels), leaf(channels, 4, scale=0.5), leaf(channels)]
    dt, bias = leaf(sizes.B, sizes.S, sizes.H), (leaf(sizes.H) - 4).detach().requires_grad_()
    A = -torch.arange(1, sizes.H + 1, device=DEVICE, dtype=torch.float32)
    scan = [leaf(sizes.B, sizes.S, channels, scale=0.3), dt, A.requires_grad_(), leaf(sizes.H), bias]
    return conv, scan


def functions(sizes: Sizes, start: torch.Tensor | None) -> dict[str, tuple[Callable, Callable]]:
    """(ours, reference) of both."""
    options: dict[str, Any] = dict(dt_limit=LIMIT, start_BS=start)

    def scan_reference(xbc, dt, A, D, bias):
        x, B, C = split(xbc, sizes)
        return ssd_reference(x, dt, A, B, C, D, bias, **options).flatten(2)

    return {
        "conv": (lambda *a: causal_conv(*a, start), lambda *a: causal_conv_reference(*a, start)),
        "scan": (lambda *a: ssd_scan(*a, head_dim=sizes.P, groups=sizes.G, **options), scan_reference),
    }


def others(sizes: Sizes) -> dict[str, dict[str, Callable]]:
    """What is installed of fla-core and mamba_ssm."""
    found: dict[str, dict[str, Callable]] = {"conv": {}, "scan": {}}
    if DEVICE == "cuda" and importlib.util.find_spec("fla"):
        fla = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
        found["conv"]["fla"] = lambda x, weight, bias: fla(x, weight, bias, activation="silu")[0]
    if DEVICE == "cuda" and importlib.util.find_spec("mamba_ssm"):
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

        def scan(xbc, dt, A, D, bias):
            x, B, C = split(xbc, sizes)
            y = combined(x, dt, A, B, C, 128, D=D, dt_bias=bias, dt_softplus=True, dt_limit=LIMIT)
            return y.flatten(2)

        found["scan"]["mamba_ssm"] = scan
    return found


def floors(sizes: Sizes) -> dict[str, tuple[float, float]]:
    tokens, inner = sizes.B * sizes.S, sizes.H * sizes.P
    channels = inner + 2 * sizes.G * sizes.N
    byte = 2 * tokens / BYTES_PER_MS
    return {"conv": (2 * channels * byte, 3 * channels * byte),
            "scan": ((channels + inner + sizes.H) * byte, (2 * channels + inner + 2 * sizes.H) * byte)}  # fmt: skip


def rows(sizes: Sizes, repeats: int) -> Iterator[dict[str, Any]]:
    leaves = dict(zip(("conv", "scan"), inputs(sizes), strict=True))
    cuts = torch.arange(1, 8, device=DEVICE) * (sizes.S // 8) + 5
    start = document_starts((torch.arange(sizes.S, device=DEVICE)[:, None] >= cuts).sum(1).expand(sizes.B, -1))
    for packed in (False, True):
        for name, (ours, reference) in functions(sizes, start if packed else None).items():
            cut = [x.detach()[:1].requires_grad_() if x.dim() == 3 else x for x in leaves[name]]
            ours, reference = functions(sizes._replace(B=1), start[:1] if packed else None)[name]
            begin = time.perf_counter()
            yield {"kernel": name, "packed": packed, "errors": errors(ours, reference, cut),
                   "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip
    theirs = others(sizes)
    for packed in (False, True):
        for name, (ours, reference) in functions(sizes, start if packed else None).items():
            arms = {"expertmesh": ours} if packed else {"expertmesh": ours, "torch": reference, **theirs[name]}
            for arm, fn in arms.items():
                case = Case(fn, leaves[name])
                for direction, floor in zip(("forward", "backward"), floors(sizes)[name], strict=True):
                    ms = median_ms(getattr(case, direction), repeats if arm != "torch" else 2)
                    yield {"kernel": name, "packed": packed, "implementation": arm, "pass": direction, "ms": ms,
                           "floor_ms": round(floor, 4), "share_of_floor": round(floor / ms, 3)}  # fmt: skip


def sweep(sizes: Sizes, repeats: int) -> Iterator[dict[str, Any]]:
    """Times a whole pass while one kernel's configuration varies; one that needs too much of the GPU is passed over."""
    conv, scan = inputs(sizes)
    ours = functions(sizes, None)
    cases = {"conv": Case(ours["conv"][0], conv), "scan": Case(ours["scan"][0], scan)}
    for name, tuning, entry, candidates in SWEEPS:
        case = cases[name.split()[0]]
        call = case.forward if entry in ("forward", "outputs") else case.backward
        shipped, times, failed = tuning[entry], [], []
        for candidate in candidates:
            tuning[entry] = candidate
            try:
                times.append([median_ms(call, repeats), candidate])
            except backends.triton.runtime.errors.OutOfResources as problem:
                failed.append([str(problem), candidate])
        tuning[entry] = shipped
        yield {"kernel": name, "shipped": shipped, "best_first": sorted(times, key=lambda t: t[0]), "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="try the configurations of the kernels' tables")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run without a GPU")
    parser.add_argument("--out", help="also write everything to this JSON file")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.batch, arguments.seq, 64, 64, 8, 128)
    repeats = arguments.repeats
    if arguments.tiny:
        sizes, repeats = Sizes(1, 136, 2, 16, 1, 16), 1
    result: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "gpus": int(DEVICE == "cuda"),
        **{name: backends.version_of(name) for name in ("torch", "triton", "fla-core", "mamba-ssm")},
        "sizes": sizes._asdict(), "rows": [],
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    torch.manual_seed(0)
    interpreted = backends.interpreted() if os.environ.get("TRITON_INTERPRET") == "1" else contextlib.nullcontext()
    with interpreted:
        for row in (sweep if arguments.sweep else rows)(sizes, repeats):
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
