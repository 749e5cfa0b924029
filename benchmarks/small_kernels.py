"""Our small kernels alone: each one's time beside its floor, PyTorch, torch.compile and Liger.

    python benchmarks/small_kernels.py --out benchmarks/results/h200_small_kernels.json
    python benchmarks/small_kernels.py --only rope,swiglu       # these kernels

A row per kernel, implementation and pass. The floor is the bytes that must move at the 4.25 TB/s that one H200 copies
with, for the loss its three matrix products at 788 TFLOP/s. `cpu_ms` is what the CPU needs to launch a call. With
TRITON_INTERPRET=1 `--tiny` runs our kernels on the CPU.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, attempt, forward_backward, interpreted, leaf, parser

from expertmesh.kernels.activation import relu2, swiglu, swiglu_reference
from expertmesh.kernels.clip import scale_, scale_reference_, squared_sum, squared_sum_reference
from expertmesh.kernels.grouping import (
    combine,
    combine_reference,
    group_by_expert,
    group_by_expert_reference,
    unsort,
    unsort_reference,
)
from expertmesh.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from expertmesh.kernels.mla_rope import mla_rope, mla_rope_reference
from expertmesh.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from expertmesh.kernels.rope import qk_norm_rope, qk_norm_rope_reference, rotary, rotary_reference
from expertmesh.kernels.router import Routing, route, route_reference
from expertmesh.kernels.router_logits import router_logits
from expertmesh.memory.adamw import AdamW

BYTES_PER_MS = 4.25e9
FLOP_PER_MS = 788e9
EPS = 1e-6
EXPERTS, TOP_K = 128, 8
#: bytes of an element that clipping and a step of AdamW must move: gradient (twice), weight and states
UPDATES = {None: 16, "8bit": 12 + 16 / 256, "24bit": 14 + 16 / 256, "float32": 30}


def liger() -> dict[str, Callable]:
    """Liger's function for each kernel of ours that it has a counterpart for; empty without a GPU or without Liger."""
    if DEVICE == "cpu" or importlib.util.find_spec("liger_kernel") is None:
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
    norm = lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS)
    yield "rms_norm", *norm, (x, weight), 2 * row, 3 * row
    added = lambda x, r, w: add_rms_norm(x, r, w, EPS), lambda x, r, w: (rms_norm_reference(x + r, w, EPS), x + r)
    yield "add_rms_norm", *added, (x, residual, weight), 4 * row, 4 * row
    width, q_heads, k_heads = 128, 32, 4
    q, k = leaf(1, tokens, q_heads, width), leaf(1, tokens, k_heads, width)
    angle = torch.randn(1, tokens, width, device=x.device)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    head_pass, rotation = (tokens * n * width * 2 / BYTES_PER_MS for n in (q_heads + k_heads, 2))
    both = lambda *inputs: qk_norm_rope(*inputs, EPS), lambda *inputs: qk_norm_rope_reference(*inputs, EPS)
    normed = q, k, leaf(width), leaf(width), cos, sin
    yield "qk_norm_rope", *both, normed, 2 * head_pass + rotation, 3 * head_pass + rotation
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
    rotation = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
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
    back = lambda p, at: unsort(p, at, y.dtype), lambda p, at: unsort_reference(p, at, y.dtype)
    yield "unsort", *back, (parts, position), rows * (6 * 4 + 4 + 2) / BYTES_PER_MS, 0.0
    grad, s = leaf(16 * tokens, hidden).detach(), torch.tensor(1.001, device=y.device)
    yield "squared_sum", lambda g: squared_sum([g]), lambda g: squared_sum_reference([g]), (grad,), 16 * row, 0.0
    for states, moved in UPDATES.items():
        weight = torch.nn.Parameter(leaf(16 * tokens, hidden).detach().bfloat16())
        yield update_case(weight, row, states, moved)
    yield "scale_", lambda g: scale_([g], s) or g, lambda g: scale_reference_([g], s) or g, (grad,), 32 * row, 0.0


def update_case(
    weight: torch.nn.Parameter, row: float, states: str | None, moved: float
) -> tuple[str, Callable, Callable, tuple, float, float]:
    """As `cases`: clipping and AdamW, beside PyTorch's with moments in the weight's dtype."""
    weight.grad = torch.randn_like(weight)
    ours = AdamW([weight], lr=1e-5, max_grad_norm=1.0, states=states)
    stock = torch.optim.AdamW([weight], lr=1e-5, fused=True)

    def ours_step() -> torch.Tensor:
        ours.step()
        return weight

    def stock_step() -> torch.Tensor:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        stock.step()
        return weight

    name = "clip and adamw" + (f" {states}" if states else "")
    return name, ours_step, stock_step, (), 16 * moved / 2 * row, 0.0


def rows(sizes: tuple[int, int, int], repeats: int, only: list[str]) -> Iterator[dict[str, Any]]:
    theirs = liger()
    for name, kernel, reference, inputs, *floors in cases(*sizes):
        if only and name not in only:
            continue
        arms = {"expertmesh": kernel, "torch": reference}
        if DEVICE == "cuda":
            arms["torch.compile"] = torch.compile(reference)
        if name in theirs:
            arms["liger"] = theirs[name]
        for arm, fn in arms.items():
            row = {"kernel": name, "implementation": arm}
            args = fn, inputs, repeats
            found = attempt(lambda args=args: forward_backward(*args), arm == "expertmesh")
            if "failed" in found:
                yield row | found
                continue
            for (what, (ms, cpu_ms)), floor in zip(found.items(), [*floors, sum(floors)], strict=False):
                # a loss that makes its gradients in the forward has no backward to compare: only the sum says something
                if what == "both" or not name.startswith("linear"):
                    times = {"pass": what, "ms": round(ms, 4), "cpu_ms": round(cpu_ms, 4)}
                    yield row | times | {"floor_ms": round(floor, 4), "share_of_floor": round(floor / ms, 3)}
        if DEVICE == "cuda":
            torch.compiler.reset()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="these kernels, by name")
    options = options.parse_args()
    tokens, hidden, vocab = (8, 64, 512) if options.tiny else (16384, 2048, 151936)
    sizes = {"tokens": tokens, "hidden": hidden, "vocab": vocab}
    result = Result(options, ("triton", "liger-kernel"), sizes=sizes)
    with interpreted():
        for row in rows((tokens, hidden, vocab), options.repeats, [name for name in options.only.split(",") if name]):
            result.add(row)


if __name__ == "__main__":
    main()
