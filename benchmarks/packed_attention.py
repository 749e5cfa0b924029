"""Attention over packed documents: Transformers' mask, ours, and as many tokens in rows that nothing is packed into.

    python benchmarks/packed_attention.py --out benchmarks/results/NAME.json

Qwen3-30B's attention (32 heads of queries, 4 of keys, width 128) in bfloat16 over one row of 16,384 tokens that holds
14 documents of unequal length; `unpacked` is four rows of 4,096. Times are medians of CUDA events over one layer's
attention; the mask, or finding the documents, comes once per forward of a model: `mask_ms`, on the wall clock because
both make the CPU wait. TFLOP/s count what the documents need: 4·N·D·length²/2 each, 2.5 times that backward. Where
flash-attn-4 is installed, the arm `expertmesh-fa4` runs our path on its kernels. Without a GPU `--tokens 64 --heads 4`
runs it all on the CPU: figures mean nothing there.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import median_ms
from torch import nn
from torch.nn.attention import activate_flash_attention_impl
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertmesh.bench.origin import origin, write
from expertmesh.layers.attention import attend
from expertmesh.layers.masks import find_documents

#: shares of the row, in 64ths
DOCUMENTS = (12, 9, 8, 7, 6, 5, 4, 3, 3, 2, 2, 1, 1, 1)
WIDTH = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def wall_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median time of one call that makes the CPU wait; three calls warm up."""
    times = []
    for _ in range(repeats + 3):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[3:])


def transformers_mask(position_ids: torch.Tensor) -> torch.Tensor | None:
    """What `create_causal_mask` does for packed rows."""
    document = masking_utils.find_packed_sequence_indices(position_ids)
    function = masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function, position_ids, document
    )
    rows, length = position_ids.shape
    return masking_utils.sdpa_mask(
        rows, length, length, mask_function=function, allow_is_causal_skip=False, device=position_ids.device
    )


def measure(
    attention: Callable, make_mask: Callable[[], Any], lengths: list[int], rows: int, heads: int, repeats: int
) -> dict[str, Any]:
    """One arm on documents of these lengths, laid out in `rows` rows."""
    tokens, key_heads = sum(lengths), max(1, heads // 8)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, tokens // rows, n, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    mask_ms = wall_ms(make_mask, repeats)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    mask = make_mask()

    def forward() -> torch.Tensor:
        return attention(module, query, key, value, mask, scaling=WIDTH**-0.5)[0]

    forward_ms = median_ms(forward, repeats)
    out = forward()
    gradient = torch.randn_like(out)
    backward_ms = median_ms(lambda: torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True), repeats)
    peak = {}
    if DEVICE == "cuda":
        del out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(forward(), (query, key, value), gradient)
        peak["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    flop = sum(2 * heads * WIDTH * length**2 for length in lengths)
    return {
        "mask_ms": round(mask_ms, 4),
        "forward_ms": round(forward_ms, 4),
        "backward_ms": round(backward_ms, 4),
        "tokens_per_second": round(tokens / (forward_ms + backward_ms) * 1e3),
        "forward_tflops": round(flop / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flop / backward_ms / 1e9, 1),
        **peak,
    }


def has_flash_attn_4() -> bool:
    return (
        DEVICE == "cuda"
        and bool(importlib.util.find_spec("flash_attn"))
        and bool(importlib.util.find_spec("flash_attn.cute"))
    )


def rows(tokens: int, heads: int, repeats: int) -> Iterator[dict[str, Any]]:
    lengths = [share * tokens // 64 for share in DOCUMENTS]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    unpacked = [tokens // 4] * 4
    arms: dict[str, tuple] = {
        "transformers": (sdpa_attention_forward, lambda: transformers_mask(positions), lengths, 1),
        "expertmesh": (attend, lambda: find_documents(positions), lengths, 1),
        "unpacked": (attend, lambda: None, unpacked, 4),
    }
    for arm, work in arms.items():
        yield {"work": "unpacked" if arm == "unpacked" else "packed", "arm": arm} | measure(*work, heads, repeats)
    if has_flash_attn_4():
        activate_flash_attention_impl("FA4")  # for the rest of the process, so it is the last
        try:
            measured = measure(*arms["expertmesh"], heads, repeats)
        except ValueError as error:  # PyTorch 2.11 unpacks two results; later versions of the package return more
            measured = {"failed": str(error)}
        yield {"work": "packed", "arm": "expertmesh-fa4"} | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="a multiple of 64")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="default: that of the working tree")
    parser.add_argument("--out", help="write the JSON here as well")
    arguments = parser.parse_args()
    if arguments.tokens % 64:
        parser.error("--tokens must be a multiple of 64")
    result: dict[str, Any] = {
        **origin(["python", *sys.argv], arguments.commit, ("triton", "transformers", "flash-attn-4")),
        "sizes": {"tokens": arguments.tokens, "documents": len(DOCUMENTS), "heads": arguments.heads, "width": WIDTH},
        "rows": [],
    }
    for row in rows(arguments.tokens, arguments.heads, arguments.repeats):
        if not result["rows"]:
            print("".join(f"{name:>18}" for name in row))
        print("".join(f"{value!s:>18}" for value in row.values()), flush=True)
        result["rows"].append(row)
        write(result, arguments.out)


if __name__ == "__main__":
    main()
