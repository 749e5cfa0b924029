"""Time the attention of one layer, with packed documents and with sinks, with flash-attn-4 and without it.

    python benchmarks/attention.py --only packed,documents --out benchmarks/results/h200_packed_attention.json
    python benchmarks/attention.py --only sinks --out benchmarks/results/h200_sink_attention.json

packed     one row of 16,384 tokens that holds 14 documents; unpacked: four rows with the same number of tokens.
           `documents` is making the mask, or finding the documents, once for all layers of a forward.
sinks      GPT-OSS, full and with a window of 128: four rows of 4,096 tokens, or one packed row with as many. Without
           flash-attn-4 it is PyTorch's FlashAttention-2 with a correction.

The floor counts 2·N·(D + V) FLOPs per visible pair of query and key, and 2.5 times that in the backward.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from shared import DEVICE, DTYPE, FLOP_PER_MS, Case, Result, parser, time_cases
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertmesh.bench.steps import documents
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents
from expertmesh.kernels.sink_attention import sink_attention
from expertmesh.layers.attention import attend, causal_placeholder
from expertmesh.layers.rows import inspect_rows

WINDOW = 128
FLASH_ATTN_4 = DEVICE == "cuda" and importlib.util.find_spec("flash_attn") is not None


class Heads(NamedTuple):
    """Number of query heads and of key heads; width of queries and keys, and of values."""

    queries: int
    keys: int
    width: int
    values: int

    def module(self) -> Any:
        """Return an object with the attributes that Transformers' attention functions read from an attention layer."""
        groups = self.queries // self.keys
        return SimpleNamespace(num_key_value_groups=groups, training=True, is_causal=True, dropout=0.0)

    def tensors(self, rows: int, length: int) -> list[torch.Tensor]:
        """Return query, key and value [B, N, S, D], with the strides of the projections' outputs."""
        sizes = (self.queries, self.width), (self.keys, self.width), (self.keys, self.values)
        made = (torch.randn(rows, length, *size, device=DEVICE).to(DTYPE) for size in sizes)
        return [x.transpose(1, 2).requires_grad_() for x in made]

    def floors(self, pairs: float) -> tuple[float, float]:
        forward = 2 * self.queries * (self.width + self.values) * pairs / FLOP_PER_MS
        return forward, 2.5 * forward


FAMILIES = {"qwen3-30b-a3b": Heads(32, 4, 128, 128), "deepseek-v3": Heads(128, 128, 192, 128)}
SINKS, TINY = Heads(64, 8, 64, 64), Heads(8, 2, 16, 16)


def visible_pairs(lengths: list[int], window: int | None = None) -> float:
    """Return the number of visible pairs of query and key in documents of these lengths."""
    return sum(n * window - window**2 / 2 if window and window < n else n**2 / 2 for n in lengths)


def without_flash_attn_4(fn: Callable) -> Callable:
    """Return `fn` with PyTorch's kernels instead of those of flash-attn-4."""

    def run(*inputs: torch.Tensor) -> Any:
        with mock.patch.object(flash_attention, "WIDTHS", frozenset()):
            return fn(*inputs)

    return run


def both_ways(fn: Callable) -> dict[str, Callable]:
    """Return the arms of one of our functions: with flash-attn-4, if it is installed, and without."""
    without = {"expertmesh-no-flash-attn-4": without_flash_attn_4(fn)} if FLASH_ATTN_4 else {}
    return {"expertmesh": fn} | without


def packed_cases(tiny: bool) -> Iterator[Case]:
    tokens = 128 if tiny else 16384
    lengths = documents(tokens, packed=True)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)

    def transformers_mask() -> torch.Tensor:
        """Return the mask that `create_causal_mask` makes for packed rows."""
        within = masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions))
        sees = masking_utils.and_masks(masking_utils.causal_mask_function, within)
        sizes = (1, tokens, tokens)
        return masking_utils.sdpa_mask(*sizes, mask_function=sees, allow_is_causal_skip=False, device=positions.device)

    def our_documents() -> Documents:
        return inspect_rows(positions.shape, None, positions, None).documents(positions.device)

    yield Case("documents", {"transformers": transformers_mask, "expertmesh": our_documents}, (), (0, 0))
    mask, found = transformers_mask(), our_documents()
    for work, heads in FAMILIES.items():
        heads = TINY if tiny else heads
        options = {"scaling": heads.width**-0.5}

        def stock(*x: torch.Tensor, heads: Heads = heads, options: dict = options) -> torch.Tensor:
            return sdpa_attention_forward(heads.module(), *x, mask, **options)[0]

        def ours(*x: torch.Tensor, heads: Heads = heads, options: dict = options) -> torch.Tensor:
            if len(x[0]) > 1:
                return attend(heads.module(), *x, None, **options)[0]
            return attend(heads.module(), *x, causal_placeholder(found, x[0].device), documents=found, **options)[0]

        yield Case(
            f"packed {work}",
            {"transformers": stock} | both_ways(ours),
            heads.tensors(1, tokens),
            heads.floors(visible_pairs(lengths)),
        )
        inputs, floors = heads.tensors(4, tokens // 4), heads.floors(4 * visible_pairs([tokens // 4]))
        yield Case(f"packed {work}: unpacked", {"expertmesh": ours}, inputs, floors)


def sink_cases(tiny: bool) -> Iterator[Case]:
    heads, length, rows = (TINY, 64, 1) if tiny else (SINKS, 4096, 4)
    for packed in (False, True):
        batch, seq = (1, length * rows) if packed else (rows, length)
        lengths = documents(seq, packed)
        found = Documents(torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), max(lengths)) if packed else None
        for window in (None, WINDOW):
            work = " ".join(filter(None, ["sinks", packed and "packed", "window" if window else "full"]))
            ours = functools.partial(sink_attention, scale=heads.width**-0.5, window=window, documents=found)
            sink = torch.randn(heads.queries, device=DEVICE).to(DTYPE).requires_grad_()
            floors = heads.floors(batch * visible_pairs(lengths, window))
            yield Case(work, both_ways(ours), [*heads.tensors(batch, seq), sink], floors)


def main() -> None:
    options = parser(__doc__, cases=True).parse_args()
    result = Result(options, ("triton", "transformers"))
    for cases in (packed_cases, sink_cases):
        time_cases(result, cases(options.tiny), options)


if __name__ == "__main__":
    main()
