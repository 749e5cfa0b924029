"""Attention with sinks: ours, what stock Transformers offers (flex, compiled; eager), and kernels without sinks.

    python benchmarks/sink_attention.py --out benchmarks/results/NAME.json
    python benchmarks/sink_attention.py --sweep forward       also dq, dkdv: configurations of one kernel, best first

GPT-OSS's attention (64 heads of queries, 8 of keys, width 64) in bfloat16 over `--rows` rows of `--length` tokens, full
and with a window of 128, and over one row as long as all of them in which 14 documents are packed. Times are medians of
CUDA events behind writes that empty the L2 cache. TFLOP/s count the pairs of queries and keys that see each other:
4·N·D each forward, 2.5 times that backward. `error` is the distance of the output and of dq from ours, where the arm
has sinks. Eager keeps N·S² scores several times over: it gets one row. Without a GPU `--rows 1 --length 64 --heads 8`
runs it all on the CPU: figures mean nothing there.
"""

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from timing import median_ms
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from expertmesh.bench.origin import origin, write
from expertmesh.bench.steps import documents as documents_of
from expertmesh.kernels import flash_attention
from expertmesh.kernels import sink_attention as kernels
from expertmesh.kernels.documents import Documents, document_bounds, document_of
from expertmesh.kernels.sink_attention import sink_attention, visible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW, GROUP = 128, 8


def table(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """Every combination of these values."""
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


#: none of these spills registers on Hopper at width 64
SWEEPS: dict[str, list[dict[str, int]]] = {
    "forward": table(BM=(128,), BN=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    + table(BM=(64,), BN=(64,), num_warps=(4,), num_stages=(2, 3)),
    "dq": table(BM=(128,), BN=(64, 128), num_warps=(8,), num_stages=(2, 3))
    + table(BM=(64,), BN=(64, 128), num_warps=(4,), num_stages=(2, 3))
    + table(BM=(128,), BN=(32,), num_warps=(4, 8), num_stages=(3,)),
    "dkdv": table(BM=(64,), BN=(128,), num_warps=(8,), num_stages=(2, 3))
    + table(BM=(32, 64), BN=(64,), num_warps=(4,), num_stages=(2, 3))
    + table(BM=(32,), BN=(128,), num_warps=(8,), num_stages=(3,))
    + table(BM=(128,), BN=(64,), num_warps=(8,), num_stages=(2,)),
}


class CuDNNWithSinks(torch.autograd.Function):
    """cuDNN's causal attention, told of the sinks through its log-sum-exp: out·σ(lse - sink), and so backward."""

    @staticmethod
    def forward(ctx: Any, query, key, value, sinks, scale):
        out, lse, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        sink = sinks.float().view(1, -1, *[1] * (lse.ndim - 2))
        out = out * torch.sigmoid(lse - sink).view(*out.shape[:3], 1).to(out.dtype)
        lse = torch.logaddexp(lse, sink)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.rest, ctx.scale = rest, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        first_q, first_k, max_q, max_k, seed, offset, _ = ctx.rest
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, query, key, value, out, lse, seed, offset, None, first_q, first_k, max_q, max_k, 0.0, True,
            scale=ctx.scale,
        )  # fmt: skip
        p = torch.exp(sinks.float().view(1, -1, 1) - lse.view(out.shape[:3]))
        return *grads, -(p * (dout.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype), None


def arms(work: str, rows: int, length: int, scale: float) -> dict[str, Callable]:
    """Functions of query, key, value [B, N, S, D] and sinks to out [B, S, N, D]; "(no sinks)" in the names of some."""
    window = WINDOW if work == "window" else None
    module = SimpleNamespace(num_key_value_groups=GROUP, training=True, is_causal=True)
    documents = start = told = None
    if work == "packed":
        lengths = documents_of(length, packed=True)
        told = Documents(torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), max(lengths))
        documents = document_bounds(document_of(told.cu_seqlens, rows, length))
        start = documents.start

    def ours(q, k, v, s):
        return sink_attention(q, k, v, s, scale, window, documents)

    def eager(q, k, v, s):
        module.sinks = s
        return eager_attention_forward(module, q, k, v, mask, scaling=scale)[0]

    def flex(q, k, v, s):
        return flex_attention_forward(module, q, k, v, block_mask, scaling=scale, s_aux=s)[0]

    def cudnn(q, k, v, s):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    def flash4(q, k, v, s):
        from flash_attn.cute import flash_attn_func

        if told is not None:
            return flash_attention.flash_attention(q, k, v, scale, s, told)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bounds = dict(window_size=(window - 1, 0)) if window else {}
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, learnable_sink=s, **bounds)[0]

    if work == "eager":
        mask = torch.where(visible(length, torch.device(DEVICE), None, None, None), 0.0, -torch.inf)[:, None].bfloat16()
        return {"expertmesh": ours, "eager": eager}
    result = {"expertmesh": ours}
    if DEVICE == "cuda":

        def sees(b, h, row, key):
            causal = (key <= row) & (key > row - window) if window else key <= row
            return causal if start is None else causal & (key >= start[b, row])

        block_mask = create_block_mask(sees, rows if start is not None else None, None, length, length, device=DEVICE)
        result["flex, compiled"] = flex
        if work == "full":
            result["cudnn (no sinks)"] = cudnn
            result["cudnn, sinks by log-sum-exp"] = lambda q, k, v, s: CuDNNWithSinks.apply(
                q, *(x.repeat_interleave(GROUP, 1) for x in (k, v)), s, scale
            ).transpose(1, 2)
            result["cudnn, the same without repeats"] = lambda q, k, v, s: CuDNNWithSinks.apply(
                q, k, v, s, scale
            ).transpose(1, 2)
        if importlib.util.find_spec("flash_attn"):
            result["flash-attn-4 (no sinks)"] = lambda q, k, v, s: flash4(q, k, v, None)
            result["flash-attn-4"] = flash4
    return result


def pairs(work: str, length: int) -> float:
    """How many pairs of a query and a key see each other in one row and head."""
    if work == "window":
        return length * WINDOW - WINDOW**2 / 2
    return sum(n**2 / 2 for n in documents_of(length, work == "packed"))


def inputs(rows: int, length: int, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, length, n, width, device=DEVICE).bfloat16().transpose(1, 2).requires_grad_()
        for n in (heads, heads // GROUP, heads // GROUP)
    )
    return query, key, value, torch.randn(heads, device=DEVICE).bfloat16().requires_grad_()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def measure(fn: Callable, leaves: tuple[torch.Tensor, ...], flop: float, repeats: int, ours: list) -> dict[str, Any]:
    """Times and rates of one arm. `ours`: output and dq of the first arm, filled by it."""
    out = fn(*leaves)
    gradient = torch.randn(out.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(out.dtype)
    needed = [x for x in leaves if x.requires_grad]

    def backward() -> Any:
        return torch.autograd.grad(out, needed, gradient, retain_graph=True, allow_unused=True)

    found = [out.detach(), backward()[0]]
    ours[:] = ours or found
    forward_ms, backward_ms = median_ms(lambda: fn(*leaves), repeats), median_ms(backward, repeats)
    return {
        "forward_ms": round(forward_ms, 4),
        "backward_ms": round(backward_ms, 4),
        "forward_tflops": round(flop / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flop / backward_ms / 1e9, 1),
        "error": [float(f"{distance(*both):.2g}") for both in zip(found, ours, strict=True)],
    }


def measured(sizes: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for work in ("full", "window", "packed", "eager"):
        rows = 1 if work in ("eager", "packed") else sizes.rows
        length = sizes.length * sizes.rows if work == "packed" else sizes.length
        leaves = inputs(rows, length, sizes.heads, sizes.width)
        flop = 4 * rows * sizes.heads * sizes.width * pairs(work, length)
        ours: list[torch.Tensor] = []
        for arm, fn in arms(work, rows, length, sizes.width**-0.5).items():
            if sizes.only not in arm and arm != "expertmesh":
                continue
            row = {"work": work, "rows": rows, "arm": arm}
            try:
                yield row | measure(fn, leaves, flop, sizes.repeats, ours)
            except Exception as error:  # other people's kernels: what they refuse is part of the table
                if arm == "expertmesh":
                    raise
                yield row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:150]}


def swept(sizes: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For full and windowed attention: [ms, configuration] of the candidates, best first; backward times are of both
    kernels."""
    leaves = inputs(sizes.rows, sizes.length, sizes.heads, sizes.width)
    for window in (None, WINDOW):
        place = sizes.sweep, 64 if sizes.width <= 64 else 128, window is not None
        shipped, times = kernels.TUNING[place], []
        out = sink_attention(*leaves, sizes.width**-0.5, window)
        for candidate in [shipped, *SWEEPS[sizes.sweep]]:
            kernels.TUNING[place] = candidate
            try:
                if sizes.sweep == "forward":
                    ms = median_ms(lambda window=window: sink_attention(*leaves, sizes.width**-0.5, window), 10)
                else:
                    ms = median_ms(lambda out=out: torch.autograd.grad(out, leaves, out, retain_graph=True), 10)
            except Exception as error:  # too much shared memory
                ms = float("inf")
                print(json.dumps({"failed": candidate, "why": str(error)[:100]}), flush=True)
            times.append([round(ms, 4), candidate])
        kernels.TUNING[place] = shipped
        times.sort(key=lambda entry: entry[0])
        yield {"kernel": sizes.sweep, "windowed": window is not None, "shipped": shipped, "best_first": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=64, help="of queries; keys have an eighth")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="besides ours, only arms with this in their names")
    parser.add_argument("--sweep", choices=SWEEPS, help="try every configuration of this kernel")
    parser.add_argument("--commit", help="default: that of the working tree")
    parser.add_argument("--out", help="write the JSON here as well")
    sizes = parser.parse_args()
    flash_attention.WIDTHS = frozenset()  # "expertmesh" and the sweep are our kernels also where flash-attn-4 would run
    result: dict[str, Any] = {
        **origin(["python", *sys.argv], sizes.commit, ("triton", "transformers", "flash-attn-4")),
        "sizes": {name: getattr(sizes, name) for name in ("rows", "length", "heads", "width")},
        "rows": [],
    }
    for row in swept(sizes) if sizes.sweep else measured(sizes):
        print(json.dumps(row) if sizes.sweep else "  ".join(f"{value!s:<26}" for value in row.values()), flush=True)
        result["rows"].append(row)
        write(result, sizes.out)  # a later one may fail


if __name__ == "__main__":
    main()
