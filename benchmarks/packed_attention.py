"""Attention over packed documents: Transformers' mask, ours, and as many tokens in rows that nothing is packed into.

    python benchmarks/packed_attention.py --out benchmarks/results/NAME.json

The attention of Qwen3-30B (32 heads of queries, 4 of keys, width 128) and DeepSeek V3 (128 heads, queries and keys 192
wide, values 128) in bfloat16 over one row of 16,384 tokens that holds 14 documents of unequal length; `unpacked` is
four rows of 4,096. Times are medians of CUDA events over one layer's attention; the mask, or finding the documents,
comes once per forward of a model: `mask_ms`, on the wall clock because both make the CPU wait. TFLOP/s count what the
documents need: 2·N·(D + V)·length²/2 each, 2.5 times that backward. Where flash-attn-4 is installed ours runs on it,
and `expertmesh-no-flash-attn-4` on PyTorch's kernel. Without a GPU `--tokens 64 --heads 4` runs it all on the CPU:
figures mean nothing there.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from timing import median_ms
from torch import nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertmesh.backends import has_flash_attention
from expertmesh.bench.origin import origin, write
from expertmesh.bench.steps import documents
from expertmesh.kernels import flash_attention
from expertmesh.layers.attention import attend
from expertmesh.layers.rows import look, placeholder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Heads(NamedTuple):
    """Heads of queries and of keys; width of queries and keys, and of values."""

    queries: int
    keys: int
    width: int
    values: int


FAMILIES = {"qwen3-30b-a3b": Heads(32, 4, 128, 128), "deepseek-v3": Heads(128, 128, 192, 128)}


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
    rows, length = position_ids.shape
    document = masking_utils.find_packed_sequence_indices(position_ids)
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(document)
    )
    return masking_utils.sdpa_mask(
        rows, length, length, mask_function=function, allow_is_causal_skip=False, device=position_ids.device
    )


def measure(
    attention: Callable, make_mask: Callable[[], Any], lengths: list[int], rows: int, heads: Heads, repeats: int
) -> dict[str, Any]:
    """One arm on documents of these lengths, laid out in `rows` rows."""
    tokens = sum(lengths)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads.queries // heads.keys, True
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, tokens // rows, *sizes, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for sizes in ((heads.queries, heads.width), (heads.keys, heads.width), (heads.keys, heads.values))
    )
    mask_ms = wall_ms(make_mask, repeats)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    mask = make_mask()

    def forward() -> torch.Tensor:
        return attention(module, query, key, value, mask, scaling=heads.width**-0.5)[0]

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
    flop = sum(heads.queries * (heads.width + heads.values) * length**2 for length in lengths)
    return {
        "mask_ms": round(mask_ms, 4),
        "forward_ms": round(forward_ms, 4),
        "backward_ms": round(backward_ms, 4),
        "tokens_per_second": round(tokens / (forward_ms + backward_ms) * 1e3),
        "forward_tflops": round(flop / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flop / backward_ms / 1e9, 1),
        **peak,
    }


def attend_packed(module: nn.Module, *tensors: Any, **options: Any) -> Any:
    """`attend` of query, key and value within the documents behind them."""
    *tensors, documents = tensors
    mask = placeholder(documents, tensors[0].device)
    return attend(module, *tensors, mask, documents=documents, **options)


def rows(tokens: int, family: str, heads: Heads, repeats: int) -> Iterator[dict[str, Any]]:
    """One per arm."""
    lengths = documents(tokens, packed=True)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    ours = attend_packed, lambda: look(positions.shape, None, positions, None).documents(positions.device), lengths, 1
    arms: dict[str, tuple] = {
        "transformers": (sdpa_attention_forward, lambda: transformers_mask(positions), lengths, 1),
        "expertmesh": ours,
        "unpacked": (attend, lambda: None, [tokens // 4] * 4, 4),
    }
    for arm, work in arms.items():
        yield {"work": family, "arm": arm} | measure(*work, heads, repeats)
    if has_flash_attention(DEVICE):
        with mock.patch.object(flash_attention, "WIDTHS", frozenset()):
            yield {"work": family, "arm": "expertmesh-no-flash-attn-4"} | measure(*ours, heads, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="a multiple of 64")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument(
        "--heads", type=int, help="of queries, instead of the family's; those of keys are as many fewer"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="default: that of the working tree")
    parser.add_argument("--out", help="write the JSON here as well")
    arguments = parser.parse_args()
    if arguments.tokens % 64:
        parser.error("--tokens must be a multiple of 64")
    result: dict[str, Any] = {
        **origin(["python", *sys.argv], arguments.commit, ("triton", "transformers", "flash-attn-4")),
        "sizes": {"tokens": arguments.tokens, "documents": len(documents(arguments.tokens, packed=True))},
        "rows": [],
    }
    for family in arguments.families:
        heads = FAMILIES[family]
        if arguments.heads:
            keys = max(1, arguments.heads * heads.keys // heads.queries)
            heads = heads._replace(queries=arguments.heads, keys=keys)
        for row in rows(arguments.tokens, family, heads, arguments.repeats):
            print(row, flush=True)
            result["rows"].append(row)
            write(result, arguments.out)


if __name__ == "__main__":
    main()
