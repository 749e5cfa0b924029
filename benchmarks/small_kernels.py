"""Norms, RoPE, SwiGLU and the loss: each kernel's time beside its floor and beside PyTorch, torch.compile and Liger.

    python benchmarks/small_kernels.py --out benchmarks/results/NAME.json

One JSON row per kernel, implementation and pass, on stdout and in the file. The floor is the bytes that must move over
4.25 TB/s (one H200 copying), for the loss its three GEMMs at 788 TFLOP/s. Forward and backward are timed apart by CUDA
events, each run behind a write that empties the L2 cache and hides the launch; the median is kept. Without a GPU
`--tokens 64 --hidden 64 --vocab 512` runs it all on the CPU (torch.compile and Liger left out): figures mean nothing
there.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from expertmesh import backends
from expertmesh.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from expertmesh.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from expertmesh.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from expertmesh.kernels.swiglu import swiglu, swiglu_reference

BYTES_PER_MS = 4.25e9
FLOP_PER_MS = 788e9
FLUSH_BYTES = 2**28
EPS = 1e-6


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(shape, device=device) * scale).bfloat16().requires_grad_()


def liger() -> dict[str, Callable]:
    """Liger's function for each kernel of ours that it has a counterpart for; empty without a GPU or without Liger."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional as f

    def heads(q, k, q_weight, k_weight, cos, sin):
        q, k = (f.liger_rms_norm(x, w, EPS, in_place=False) for x, w in ((q, q_weight), (k, k_weight)))
        return f.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return {
        "rms_norm": lambda x, w: f.liger_rms_norm(x, w, EPS, in_place=False),
        "add_rms_norm": lambda x, r, w: f.liger_fused_add_rms_norm(x, r, w, EPS, in_place=False),
        "qk_norm_rope": heads,
        "swiglu": f.liger_swiglu,
        "linear_cross_entropy": lambda h, w, y: f.liger_fused_linear_cross_entropy(h, w, y),
        "linear_cross_entropy, frozen weight": lambda h, w, y: f.liger_fused_linear_cross_entropy(h, w, y),
    }


def cases(tokens: int, hidden: int, vocab: int) -> Iterator[tuple[str, Callable, Callable, tuple, float, float]]:
    """(name, kernel, reference, inputs, forward floor in ms, backward floor in ms)."""
    row = tokens * hidden * 2 / BYTES_PER_MS  # one pass over [T, H] in bfloat16
    x, residual, weight = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    yield (
        "rms_norm",
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: rms_norm_reference(x, w, EPS),
        (x, weight),
        2 * row,
        3 * row,
    )
    yield (
        "add_rms_norm",
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: add_rms_norm_reference(x, r, w, EPS),
        (x, residual, weight),
        4 * row,
        4 * row,
    )
    width, q_heads, k_heads = 128, 32, 4
    q, k = leaf(1, tokens, q_heads, width), leaf(1, tokens, k_heads, width)
    angle = torch.randn(1, tokens, width, device=x.device)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    head_pass, rotation = (tokens * n * width * 2 / BYTES_PER_MS for n in (q_heads + k_heads, 2))
    yield (
        "qk_norm_rope",
        lambda *inputs: qk_norm_rope(*inputs, EPS),
        lambda *inputs: qk_norm_rope_reference(*inputs, EPS),
        (q, k, leaf(width), leaf(width), cos, sin),
        2 * head_pass + rotation,
        3 * head_pass + rotation,
    )
    yield "swiglu", swiglu, swiglu_reference, (leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)), 9 * row, 15 * row
    gemm = 2 * tokens * hidden * vocab / FLOP_PER_MS
    labels = torch.randint(0, vocab, (tokens,), device=x.device)
    loss = linear_cross_entropy, linear_cross_entropy_reference
    yield "linear_cross_entropy", *loss, (x, leaf(vocab, hidden, scale=0.02), labels), gemm, 2 * gemm
    frozen = leaf(vocab, hidden, scale=0.02).detach()
    yield "linear_cross_entropy, frozen weight", *loss, (x, frozen, labels), gemm, gemm


def median_ms(fn: Callable[[], Any], repeats: int) -> float:
    """Median time of one call, after three to warm up (and compile)."""
    cuda = torch.cuda.is_available()
    flush = torch.empty(FLUSH_BYTES if cuda else 1, dtype=torch.int8, device="cuda" if cuda else "cpu")
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        if cuda:
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
        if i >= 3:
            times.append(elapsed)
    return statistics.median(times)


def measure(fn: Callable, inputs: tuple[torch.Tensor, ...], repeats: int) -> dict[str, float]:
    """Times of forward (keeping what backward needs), backward, and both; peak memory of both in GiB, on a GPU."""
    leaves = [x for x in inputs if x.requires_grad]

    def outputs() -> list[torch.Tensor]:
        result = fn(*inputs)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    grads = [torch.randn_like(y) for y in outputs()]

    def both() -> None:
        torch.autograd.grad(outputs(), leaves, grads)

    kept = outputs()

    def backward() -> None:
        torch.autograd.grad(kept, leaves, grads, retain_graph=True)

    found = {"forward": median_ms(outputs, repeats), "backward": median_ms(backward, repeats)}
    kept.clear()
    before = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found["both"] = median_ms(both, repeats)
    if torch.cuda.is_available():
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before - FLUSH_BYTES) / 2**30
    return found


def rows(tokens: int, hidden: int, vocab: int, repeats: int) -> Iterator[dict[str, Any]]:
    theirs = liger()
    for name, kernel, reference, inputs, forward_floor, backward_floor in cases(tokens, hidden, vocab):
        arms = {"expertmesh": kernel, "torch": reference}
        if torch.cuda.is_available():
            arms["torch.compile"] = torch.compile(reference)
        if name in theirs:
            arms["liger"] = theirs[name]
        floors = {"forward": forward_floor, "backward": backward_floor, "both": forward_floor + backward_floor}
        for arm, fn in arms.items():
            times = measure(fn, inputs, repeats)
            peak = times.pop("peak_gib", None)
            # a loss that makes its gradients in forward has no backward to compare: only the sum is meaningful
            for direction in ("both",) if name.startswith("linear") else times:
                floor = floors[direction]
                row = {"kernel": name, "implementation": arm, "pass": direction, "ms": round(times[direction], 4)}
                row |= {"floor_ms": round(floor, 4), "share_of_floor": round(floor / times[direction], 3)}
                yield row | ({"peak_gib": round(peak, 3)} if peak is not None and direction == "both" else {})
        torch.compiler.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", help="also write everything to this JSON file")
    parser.add_argument("--commit", help="the commit to record where there is no git repository")
    arguments = parser.parse_args()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gpus": int(torch.cuda.is_available()),
        **{name: backends.version_of(name) for name in ("torch", "triton", "liger-kernel")},
        "commit": arguments.commit or head,
        "command": " ".join(["python", *sys.argv]),
        "sizes": {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab},
        "rows": [],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}), flush=True)
    for row in rows(arguments.tokens, arguments.hidden, arguments.vocab, arguments.repeats):
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
