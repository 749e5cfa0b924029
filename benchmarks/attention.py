"""Attention kernels of four families, alone: ours, Transformers' and other libraries', forward and backward.

    python benchmarks/attention.py --work causal --out benchmarks/results/h200_attention.json
    python benchmarks/attention.py --work packed --out benchmarks/results/h200_packed_attention.json
    python benchmarks/attention.py --work sinks --out benchmarks/results/h200_sink_attention.json

causal  rows of 4,096 tokens at the shapes of three families. `sdpa` is what PyTorch chooses by itself.
packed  one row of 16,384 tokens that holds 14 documents, and four unpacked rows with as many tokens. `mask_ms` is the
        wall time of making the mask or of finding the documents, once for all layers of a forward.
sinks   GPT-OSS: full, with a window of 128, and packed. `expertmesh` is our Triton kernels.

Times are medians of CUDA events. TFLOP/s count the pairs of query and key that see each other: 2·N·(D + V) each,
2.5 times that in the backward. `error` is the distance of output and dq from the first arm's.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from shared import DEVICE, DTYPE, Result, attempt, forward_backward, parser
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from expertmesh.bench.steps import documents
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import Documents, document_bounds, document_of
from expertmesh.kernels.sink_attention import sink_attention, visible
from expertmesh.layers.attention import attend, placeholder
from expertmesh.layers.rows import look

WINDOW = 128
FLASH_ATTN_4 = DEVICE == "cuda" and importlib.util.find_spec("flash_attn") is not None


class Heads(NamedTuple):
    """Heads of queries and of keys; width of queries and keys, and of values."""

    queries: int
    keys: int
    width: int
    values: int

    def module(self) -> Any:
        """What Transformers' attention functions read of an attention layer."""
        groups = self.queries // self.keys
        return SimpleNamespace(num_key_value_groups=groups, training=True, is_causal=True, dropout=0.0)

    def tensors(self, rows: int, length: int) -> list[torch.Tensor]:
        """Query, key and value [B, N, S, D] as the projections leave them."""
        torch.manual_seed(0)
        sizes = (self.queries, self.width), (self.keys, self.width), (self.keys, self.values)
        made = (torch.randn(rows, length, *size, device=DEVICE).to(DTYPE) for size in sizes)
        return [x.transpose(1, 2).requires_grad_() for x in made]


FAMILIES = {
    "qwen3-30b-a3b": Heads(32, 4, 128, 128),
    "nemotron-3-nano": Heads(32, 2, 128, 128),
    "deepseek-v3": Heads(128, 128, 192, 128),
}
SINKS, TINY = Heads(64, 8, 64, 64), Heads(8, 2, 16, 16)


def measure(fn: Callable, leaves: list[torch.Tensor], heads: Heads, pairs: float, repeats: int, first: list) -> dict:
    """Times, rates and errors of one arm; `first` holds output and dq of the first arm, which fills it."""
    out = fn(*leaves)
    gradient = torch.randn(out.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(out.dtype)
    found = [out.detach(), torch.autograd.grad(out, leaves[0], gradient)[0]]
    first[:] = first or found
    times = forward_backward(fn, leaves, repeats)
    row = {f"{name}_ms": round(times[name][0], 4) for name in ("forward", "backward")}
    flop = 2 * heads.queries * (heads.width + heads.values) * pairs
    rates = {f"{name}_tflops": round(share * flop / times[name][0] / 1e9, 1) for name, share in
             (("forward", 1), ("backward", 2.5))}  # fmt: skip
    errors = [float(f"{_distance(*both):.2g}") for both in zip(found, first, strict=True)]
    return row | rates | {"error": errors}


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def seen(lengths: list[int], window: int | None = None) -> float:
    """How many pairs of a query and a key see each other in documents of these lengths."""
    return sum(n * window - window**2 / 2 if window and window < n else n**2 / 2 for n in lengths)


def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, **options)[0]


def causal(options: Any) -> Iterator[dict[str, Any]]:
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2)

    def of_backend(backend: SDPBackend) -> Callable:
        def attention(*tensors: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(*tensors)

        return attention

    arms: dict[str, Callable] = {"sdpa": sdpa}
    if DEVICE == "cuda":
        arms |= {"cudnn": of_backend(SDPBackend.CUDNN_ATTENTION)}
        arms |= {"flash-attn-2": of_backend(SDPBackend.FLASH_ATTENTION)}
    if FLASH_ATTN_4:
        arms["flash-attn-4"] = flash_attn_4
    length = 64 if options.tiny else 4096
    for work, heads in FAMILIES.items():
        heads = TINY if options.tiny else heads
        for batch in (1, 2, 4):
            leaves, first = heads.tensors(batch, length), []
            for arm, fn in arms.items():
                args = fn, leaves, heads, batch * seen([length]), options.repeats, first
                found = attempt(lambda args=args: measure(*args), arm == "sdpa")
                if "forward_ms" in found:
                    found["both_ms"] = round(found["forward_ms"] + found["backward_ms"], 4)
                yield {"work": work, "batch": batch, "seq": length, "arm": arm} | found


def packed(options: Any) -> Iterator[dict[str, Any]]:
    tokens = 128 if options.tiny else 16384
    lengths = documents(tokens, packed=True)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)

    def transformers_mask() -> Any:
        """What `create_causal_mask` makes for packed rows."""
        within = masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions))
        sees = masking_utils.and_masks(masking_utils.causal_mask_function, within)
        sizes = (1, tokens, tokens)
        return masking_utils.sdpa_mask(*sizes, mask_function=sees, allow_is_causal_skip=False, device=positions.device)

    def our_documents() -> Any:
        return look(positions.shape, None, positions, None).documents(positions.device)

    for work in ("qwen3-30b-a3b", "deepseek-v3"):
        heads = TINY if options.tiny else FAMILIES[work]
        module, scale = heads.module(), heads.width**-0.5

        def stock(*tensors: torch.Tensor, mask: Any, module: Any = module, scale: float = scale) -> torch.Tensor:
            return sdpa_attention_forward(module, *tensors, mask, scaling=scale)[0]

        def ours(*tensors: torch.Tensor, mask: Any, module: Any = module, scale: float = scale) -> torch.Tensor:
            place = None if mask is None else placeholder(mask, tensors[0].device)
            return attend(module, *tensors, place, scaling=scale, documents=mask)[0]

        first: list = []
        arms = {"transformers": (stock, transformers_mask), "expertmesh": (ours, our_documents),
                "unpacked": (ours, lambda: None)}  # fmt: skip
        if FLASH_ATTN_4:
            arms["expertmesh-no-flash-attn-4"] = ours, our_documents
        for arm, (attention, make) in arms.items():
            rows, held = (4, [tokens // 4] * 4) if arm == "unpacked" else (1, lengths)
            leaves, mask = heads.tensors(rows, tokens // rows), make()
            widths = frozenset() if arm.endswith("flash-attn-4") else flash_attention.WIDTHS
            with mock.patch.object(flash_attention, "WIDTHS", widths):
                fn = lambda *x, attention=attention, mask=mask: attention(*x, mask=mask)  # noqa: E731
                found = measure(fn, leaves, heads, seen(held), options.repeats, [] if rows > 1 else first)
            rate = round(tokens / (found["forward_ms"] + found["backward_ms"]) * 1e3)
            mask_ms = round(_wall_ms(make, options.repeats), 4)
            yield {"work": work, "arm": arm, "mask_ms": mask_ms, **found, "tokens_per_second": rate}


def _wall_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that makes the CPU wait for the GPU."""
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[3:])


def sinks(options: Any) -> Iterator[dict[str, Any]]:
    heads, length, rows = (TINY, 64, 1) if options.tiny else (SINKS, 4096, 4)
    for work in ("full", "window", "packed", "eager"):
        packs = work == "packed"
        batch, seq = (1, length * rows) if packs else (1 if work == "eager" else rows, length)
        torch.manual_seed(1)
        sink = torch.randn(heads.queries, device=DEVICE).to(DTYPE).requires_grad_()
        leaves, first = [*heads.tensors(batch, seq), sink], []
        window = WINDOW if work == "window" else None
        for arm, fn in sink_arms(work, batch, seq, heads).items():
            args = fn, leaves, heads, batch * seen(documents(seq, packs), window), options.repeats, first
            row = {"work": work, "rows": batch, "arm": arm}
            yield row | attempt(lambda args=args: measure(*args), arm == "expertmesh")


def sink_arms(work: str, batch: int, seq: int, heads: Heads) -> dict[str, Callable]:
    """Functions of query, key, value and sinks; "(no sinks)" in the name of one that ignores them."""
    scale, module = heads.width**-0.5, heads.module()
    window = WINDOW if work == "window" else None
    found = bounds = None
    if work == "packed":
        lengths = documents(seq, packed=True)
        found = Documents(torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), max(lengths))
        bounds = document_bounds(document_of(found.cu_seqlens, batch, seq))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        module.sinks = s
        return eager_attention_forward(module, q, k, v, mask, scaling=scale)[0]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        if found is not None:
            return flash_attention.flash_attention(q, k, v, scale, s, found)
        limits = dict(window_size=(window - 1, 0)) if window else {}
        return flash_attn_4(q, k, v, softmax_scale=scale, learnable_sink=s, **limits)

    arms: dict[str, Callable] = {"expertmesh": lambda q, k, v, s: sink_attention(q, k, v, s, scale, window, bounds)}
    if work == "eager":
        mask = torch.where(visible(seq, torch.device(DEVICE), None, None, None), 0.0, -torch.inf)[:, None].to(DTYPE)
        return arms | {"eager": eager}
    if DEVICE == "cuda":

        def sees(b: Any, h: Any, row: Any, key: Any) -> Any:
            near = (key <= row) & (key > row - window) if window else key <= row
            return near if bounds is None else near & (key >= bounds.start[b, row])

        blocks = create_block_mask(sees, None if bounds is None else batch, None, seq, seq, device=DEVICE)
        arms["flex, compiled"] = lambda q, k, v, s: flex_attention_forward(
            module, q, k, v, blocks, scaling=scale, s_aux=s
        )[0]
    if FLASH_ATTN_4:
        arms["flash-attn-4 (no sinks)"] = lambda q, k, v, s: flash(q, k, v, None)
        arms["flash-attn-4"] = flash
    return arms


def main() -> None:
    works = {"causal": causal, "packed": packed, "sinks": sinks}
    options = parser(__doc__)
    options.add_argument("--work", choices=works, required=True)
    options = options.parse_args()
    result = Result(options, ("triton", "transformers", "flash-attn-4"))
    # "expertmesh" of `sinks` is our kernels, also where a model would train by flash-attn-4
    widths = frozenset() if options.work == "sinks" else flash_attention.WIDTHS
    with mock.patch.object(flash_attention, "WIDTHS", widths):
        for row in works[options.work](options):
            result.add(row)


if __name__ == "__main__":
    main()
