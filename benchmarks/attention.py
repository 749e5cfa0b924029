"""Causal attention without sinks at the shapes of three families: which kernel is the fastest, forward and backward.

    python benchmarks/attention.py --out benchmarks/results/NAME.json

bfloat16, queries, keys and values as the projections leave them, at 1 and 4 rows of 4,096 tokens. `sdpa` is what
PyTorch chooses by itself; the others are asked for by name. Our models train by flash-attn-4 where it is installed.
Times, rates and errors (against `sdpa`) as in sink_attention.py, where GPT-OSS is; all layers of a model call the same
kernel, so the rule for choosing one is the sum of a row. Without a GPU `--length 64 --share 8` runs it on the CPU.
"""

import argparse
import importlib.util
import sys

import torch
from sink_attention import DEVICE, measure
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from expertmesh.bench.origin import origin, write

#: heads of queries, heads of keys and values, width of queries and keys, width of values
SHAPES = {
    "qwen3-30b-a3b": (32, 4, 128, 128),
    "nemotron-3-nano": (32, 2, 128, 128),
    "deepseek-v3": (128, 128, 192, 128),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash-attn-2": SDPBackend.FLASH_ATTENTION}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def of_backend(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attention


def flash_attn_4(q, k, v):
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0]


def arms():
    """Functions of query, key, value [B, N, S, D] to out [B, S, N, D]."""
    found = {"sdpa": sdpa}
    if DEVICE == "cuda":
        found |= {name: of_backend(backend) for name, backend in BACKENDS.items()}
        if importlib.util.find_spec("flash_attn"):
            found["flash-attn-4"] = flash_attn_4
    return found


def rows(options):
    for work in options.works:
        heads, key_heads, width, value_width = SHAPES[work]
        heads, key_heads = heads // options.share, max(1, key_heads // options.share)
        for batch in options.batches:
            torch.manual_seed(0)
            leaves = tuple(
                torch.randn(batch, options.length, n, d, device=DEVICE).bfloat16().transpose(1, 2).requires_grad_()
                for n, d in ((heads, width), (key_heads, width), (key_heads, value_width))
            )
            flop = batch * heads * (width + value_width) * options.length**2
            first = []
            for arm, attention in arms().items():
                row = {"work": work, "batch": batch, "seq": options.length, "arm": arm}
                try:
                    found = measure(attention, leaves, flop, options.repeats, first)
                    both = round(found["forward_ms"] + found["backward_ms"], 4)
                    yield row | found | {"both_ms": both}
                except Exception as error:  # other people's kernels: what they refuse is part of the table
                    if arm == "sdpa":
                        raise
                    yield row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:150]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--share", type=int, default=1, help="divides the numbers of heads")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="default: that of the working tree")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    result = origin(["python", *sys.argv], options.commit, ("triton", "flash-attn-4")) | {"rows": []}
    for row in rows(options):
        print("  ".join(f"{value!s:<18}" for value in row.values()), flush=True)
        result["rows"].append(row)
        write(result, options.out)


if __name__ == "__main__":
    main()
