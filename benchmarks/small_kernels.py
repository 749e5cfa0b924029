"""Norms, RoPE, SwiGLU, routing, loss, clipping: each kernel's time beside its floor, PyTorch, torch.compile and Liger.

    python benchmarks/small_kernels.py --out benchmarks/results/NAME.json
    python benchmarks/small_kernels.py --sweep                 every configuration of every kernel's table, best first

One JSON row per kernel, implementation and pass, on stdout and in the file. The floor is the bytes that must move over
4.25 TB/s (one H200 copying), for the loss its three GEMMs at 788 TFLOP/s. Forward and backward are timed apart by CUDA
events, each run behind writes that empty the L2 cache and keep the GPU busy for longer than the CPU needs to launch;
the median is kept. `cpu_ms` is that CPU time: what one call costs a step whose GPU work is short. Without a GPU
`--tokens 64 --hidden 64 --vocab 512` (with TRITON_INTERPRET=1 `--tokens 8 --repeats 1`) runs it all on the CPU,
torch.compile and Liger left out: figures mean nothing there.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import FLUSH_BYTES, median_ms, medians_ms

from expertmesh import backends
from expertmesh.bench.origin import origin, write
from expertmesh.kernels import activation as swiglu_kernels
from expertmesh.kernels import linear_cross_entropy as loss_kernels
from expertmesh.kernels import mla_rope as mla_kernels
from expertmesh.kernels import rms_norm as norm_kernels
from expertmesh.kernels import rope as rope_kernels
from expertmesh.kernels.activation import relu2, swiglu, swiglu_reference
from expertmesh.kernels.clip import scale_, scale_reference_, squared_sum, squared_sum_reference
from expertmesh.kernels.combine import combine, combine_reference, unsort, unsort_reference
from expertmesh.kernels.grouping import group_by_expert, group_by_expert_reference
from expertmesh.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from expertmesh.kernels.mla_rope import mla_rope, mla_rope_reference
from expertmesh.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from expertmesh.kernels.rope import qk_norm_rope, qk_norm_rope_reference, rotary, rotary_reference
from expertmesh.kernels.router import Routing, route, route_reference
from expertmesh.kernels.router_logits import router_logits

BYTES_PER_MS = 4.25e9
FLOP_PER_MS = 788e9
EPS = 1e-6
EXPERTS, TOP_K = 128, 8


def table(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """Every combination of these values."""
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


#: kernel: (its table, {pass: configurations to try})
SWEEPS: dict[str, tuple[dict[str, dict[str, int]], dict[str, list[dict[str, int]]]]] = {
    "add_rms_norm": (
        norm_kernels.TUNING,
        {
            "forward": table(elements=(2048, 4096), per_thread=(8, 16)),
            "backward": table(elements=(2048,), per_thread=(8, 16), programs=(2, 3, 4, 6))
            + table(elements=(4096,), per_thread=(16,), programs=(1, 2)),
        },
    ),
    "qk_norm_rope": (
        rope_kernels.NORM_TUNING,
        {
            "forward": table(ROWS=(8, 16, 32), num_warps=(2, 4)),
            "backward": table(ROWS=(8,), num_warps=(2,), programs=(8, 10, 16))
            + table(ROWS=(16,), num_warps=(4,), programs=(4, 5, 8))
            + table(ROWS=(16,), num_warps=(8,), programs=(3, 4))
            + table(ROWS=(32,), num_warps=(8,), programs=(2,)),
        },
    ),
    "rope": (
        rope_kernels.TUNING,
        {
            "forward": table(ROWS=(4, 8, 16, 32), num_warps=(2, 4)),
            "backward": table(ROWS=(4, 8, 16, 32), num_warps=(2, 4)),
        },
    ),
    "mla_rope": (
        mla_kernels.TUNING,
        {
            "forward": table(HEADS=(8,), num_warps=(2, 4)) + table(HEADS=(16, 32), num_warps=(4, 8)),
            "backward": table(HEADS=(8,), num_warps=(2, 4)) + table(HEADS=(16, 32), num_warps=(4, 8)),
        },
    ),
    "swiglu": (
        swiglu_kernels.TUNING,
        {
            "forward": table(elements=(1024, 2048, 4096), num_warps=(4,)),
            "backward": table(elements=(1024, 2048, 4096), num_warps=(4, 8)),
        },
    ),
    "linear_cross_entropy": (
        loss_kernels.TUNING,
        {
            "rows": table(BLOCK=(4096, 8192), num_warps=(8,))
            + table(BLOCK=(8192,), num_warps=(16,))
            + table(BLOCK=(16384, 32768), num_warps=(16, 32)),
            "scale": table(BLOCK=(2048, 4096, 8192), num_warps=(4, 8)),
        },
    ),
}


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
        "rope": lambda q, k, cos, sin: f.liger_rope(q.clone(), k.clone(), cos, sin),  # it works in place
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
    turned = (q.detach().transpose(1, 2).requires_grad_(), k.detach().transpose(1, 2).requires_grad_(), cos, sin)
    yield "rope", rotary, rotary_reference, turned, 2 * head_pass + rotation, 2 * head_pass + rotation
    yield latent_case(min(tokens, 4096))  # as many as a GPU holds of DeepSeek V3's widths
    yield "swiglu", swiglu, swiglu_reference, (leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)), 9 * row, 15 * row
    yield from routing_cases(tokens, hidden)
    gemm = 2 * tokens * hidden * vocab / FLOP_PER_MS
    labels = torch.randint(0, vocab, (tokens,), device=x.device)
    loss = linear_cross_entropy, linear_cross_entropy_reference
    yield "linear_cross_entropy", *loss, (x, leaf(vocab, hidden, scale=0.02), labels), gemm, 2 * gemm
    frozen = leaf(vocab, hidden, scale=0.02).detach()
    yield "linear_cross_entropy, frozen weight", *loss, (x, frozen, labels), gemm, gemm


def latent_case(tokens: int) -> tuple[str, Callable, Callable, tuple, float, float]:
    """As `cases`, with DeepSeek V3's 128 heads: 128 wide without and 64 with position, values 128."""
    heads, nope, rope = 128, 128, 64
    q, kv, k_rope = leaf(1, tokens, heads, nope + rope), leaf(1, tokens, heads, 2 * nope), leaf(1, tokens, rope)
    angle = torch.randn(1, tokens, rope, device=q.device)
    rotation = angle.cos().bfloat16(), angle.sin().bfloat16()
    row = tokens * heads * 2 / BYTES_PER_MS  # one element of every head
    small = 3 * tokens * rope * 2 / BYTES_PER_MS  # cos, sin, k_rope
    return (
        "mla_rope",
        lambda *x: mla_rope(*x, *rotation),
        lambda *x: mla_rope_reference(*x, *rotation),
        (q, kv, k_rope),
        (3 * (nope + rope) + nope) * row + small,  # the values stay where they are
        (3 * (nope + rope) + nope + 2 * nope) * row + small,
    )


def routing_cases(tokens: int, hidden: int) -> Iterator[tuple[str, Callable, Callable, tuple, float, float]]:
    """As `cases`; what has no backward gets 0 as its floor."""
    rows = tokens * TOP_K
    logits, routing = leaf(tokens, EXPERTS), Routing("softmax", TOP_K, normalize=True)
    weights, ids = (x.detach() for x in route_reference(logits, routing))
    logit_pass = tokens * EXPERTS * 2 / BYTES_PER_MS
    row = tokens * hidden * 2 / BYTES_PER_MS
    products = router_logits, lambda x, w: torch.nn.functional.linear(x.float(), w.float())
    inputs = leaf(tokens, hidden), leaf(EXPERTS, hidden, scale=0.02)
    yield "router_logits", *products, inputs, row + 2 * logit_pass, 2 * row + 2 * logit_pass
    yield "relu2", relu2, lambda x: torch.relu(x).square(), (leaf(tokens, 2 * hidden),), 4 * row, 6 * row
    router = (
        lambda x: route(x, routing, weight_dtype=x.dtype)[0],
        lambda x: route_reference(x, routing, weight_dtype=x.dtype)[0],
    )
    yield "route", *router, (logits,), logit_pass + rows * 10 / BYTES_PER_MS, 2 * logit_pass + rows * 10 / BYTES_PER_MS
    sort = (
        lambda ids, weights: group_by_expert(ids, EXPERTS, weights).position_TK,
        lambda ids, weights: group_by_expert_reference(ids, EXPERTS, weights).position_TK,
    )
    yield "group_by_expert", *sort, (ids, weights), rows * (8 + 4 + 4 * 4) / BYTES_PER_MS, 0.0
    position = group_by_expert_reference(ids, EXPERTS).position_TK
    y = leaf(rows, hidden).detach()
    yield (
        "combine",
        combine,
        combine_reference,
        (y, position, weights),
        (rows + tokens) * hidden * 2 / BYTES_PER_MS,
        0.0,
    )
    parts = torch.randn(6, rows, device=y.device)
    back = (
        lambda parts, position: unsort(parts, position, y.dtype),
        lambda parts, position: unsort_reference(  # noqa: E731
            parts, position, y.dtype
        ),
    )
    yield "unsort", *back, (parts, position), rows * (6 * 4 + 4 + 2) / BYTES_PER_MS, 0.0
    grad, s = leaf(16 * tokens, hidden).detach(), torch.tensor(1.001, device=y.device)
    yield "squared_sum", lambda g: squared_sum([g]), lambda g: squared_sum_reference([g]), (grad,), 16 * row, 0.0
    yield "scale_", lambda g: scale_([g], s) or g, lambda g: scale_reference_([g], s) or g, (grad,), 32 * row, 0.0


def measure(fn: Callable, inputs: tuple[torch.Tensor, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Times of forward (keeping what backward needs), backward, and both, with peak memory in GiB; forward alone where
    no input has a gradient."""
    leaves = [x for x in inputs if x.requires_grad]

    def outputs() -> list[torch.Tensor]:
        result = fn(*inputs)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    def timed(name: str, fn: Callable[[], Any]) -> dict[str, Any]:
        ms, cpu_ms = medians_ms(fn, repeats)
        return {"pass": name, "ms": round(ms, 4), "cpu_ms": round(cpu_ms, 4)}

    yield timed("forward", outputs)
    if not leaves:
        return
    kept = outputs()
    grads = [torch.randn_like(y) for y in kept]

    def backward() -> None:
        torch.autograd.grad(kept, leaves, grads, retain_graph=True)

    yield timed("backward", backward)
    kept.clear()
    before = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    both = timed("both", lambda: torch.autograd.grad(outputs(), leaves, grads))
    if torch.cuda.is_available():
        both["peak_gib"] = round((torch.cuda.max_memory_allocated() - before - FLUSH_BYTES) / 2**30, 3)
    yield both


def sweep(tokens: int, hidden: int, vocab: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per pass of each kernel: [ms, configuration] of its candidates, best first."""
    found = {name: (fn, inputs, floors) for name, fn, _, inputs, *floors in cases(tokens, hidden, vocab)}
    for kernel, (tuning, passes) in SWEEPS.items():
        fn, inputs, floors = found[kernel]
        calls: dict[str, tuple[Callable[[], Any], float]]
        if kernel == "linear_cross_entropy":
            calls = loss_calls(inputs[0].device, hidden, vocab)
        else:
            kept = list(fn(*inputs)) if kernel != "swiglu" else [fn(*inputs)]
            grads = [torch.randn_like(y) for y in kept]
            leaves = [x for x in inputs if x.requires_grad]
            calls = {
                "forward": (lambda fn=fn, inputs=inputs: fn(*inputs), floors[0]),
                "backward": (
                    lambda kept=kept, leaves=leaves, grads=grads: torch.autograd.grad(
                        kept, leaves, grads, retain_graph=True
                    ),
                    floors[1],
                ),
            }
        for name, candidates in passes.items():
            call, floor = calls[name]
            shipped = dict(tuning[name])
            times = []
            for candidate in candidates:
                tuning[name].update(candidate)
                times.append([round(median_ms(call, repeats), 4), candidate])
            tuning[name].update(shipped)
            times.sort(key=lambda entry: entry[0])
            yield {"kernel": kernel, "pass": name, "floor_ms": round(floor, 4), "shipped": shipped, "best_first": times}


def loss_calls(device: torch.device, hidden: int, vocab: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """The two kernels of the loss, without its GEMMs: one chunk of rows, and the head's gradient scaled."""
    rows = loss_kernels.chunk_rows(2**30, vocab, torch.bfloat16, device) if device.type == "cuda" else 16
    logits = torch.randn(rows, -(-vocab // 16) * 16, device=device, dtype=torch.bfloat16)[:, :vocab]
    labels = torch.randint(0, vocab, (rows,), device=device)
    gradient, scale = torch.randn(vocab, hidden, device=device), torch.ones(1, device=device)
    return {
        "rows": (lambda: loss_kernels._rows(logits, labels, -100, True), 3 * rows * vocab * 2 / BYTES_PER_MS),
        "scale": (lambda: loss_kernels._scaled(gradient, scale, torch.bfloat16), vocab * hidden * 6 / BYTES_PER_MS),
    }


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
            for times in measure(fn, inputs, repeats):
                # a loss that makes its gradients in forward has no backward to compare: only the sum is meaningful
                if times["pass"] == "both" or not name.startswith("linear"):
                    floor = floors[times["pass"]]
                    share = round(floor / times["ms"], 3)
                    row = {"kernel": name, "implementation": arm, **times}
                    yield row | {"floor_ms": round(floor, 4), "share_of_floor": share}
        torch.compiler.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="try every configuration of the kernels' tables")
    parser.add_argument("--out", help="also write everything to this JSON file")
    parser.add_argument("--commit", help="the commit to record where there is no git repository")
    arguments = parser.parse_args()
    result = {
        **origin(["python", *sys.argv], arguments.commit, ("triton", "liger-kernel")),
        "sizes": {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab},
        "rows": [],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}), flush=True)
    work = sweep if arguments.sweep else rows
    interpreted = backends.interpreted() if os.environ.get("TRITON_INTERPRET") == "1" else contextlib.nullcontext()
    with interpreted:
        for row in work(arguments.tokens, arguments.hidden, arguments.vocab, arguments.repeats):
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            write(result, arguments.out)  # a later one may fail


if __name__ == "__main__":
    main()
