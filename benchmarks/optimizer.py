"""Clipping and AdamW alone, on one GPU: PyTorch's fused AdamW behind clip_grad_norm_, and ours that clips as it steps.

    python benchmarks/optimizer.py --out benchmarks/results/NAME.json
    python benchmarks/optimizer.py --sweep       every size of tile and chunk of our kernels, best first; prints only

Parameters have the shapes of Qwen3-30B-A3B: 8 layers (5.6e9 parameters, bfloat16), and 24, half of the model, where
weights, gradients and states fit. One JSON row per size, arm and part ("clip": norm and scaling, or ours: norm alone;
"step"; "both"), on stdout and in the file. `share` is that of the copy rate measured here, at the bytes that must move:
weight, gradient and two states read, three written, and the gradient read once more for the norm, 16 a parameter. Times
are medians of CUDA events, `cpu_ms` what the CPU needs to launch. `--tiny` is for a CPU; figures
mean nothing there.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import median_ms, medians_ms

from expertmesh.bench.origin import origin, write
from expertmesh.kernels import adamw, clip, tensor_lists
from expertmesh.kernels.clip import squared_sum
from expertmesh.memory.adamw import AdamW
from expertmesh.parallel.clip import grad_norm

PARTS = {"clip": 2, "step": 14, "both": 16}  # bytes that must move for a parameter in bfloat16
CLIP = 1.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Optimizer = torch.optim.Optimizer


def shapes(layers: int, tiny: bool) -> list[tuple[int, ...]]:
    """The parameters of so many layers of Qwen3-30B-A3B, with embedding and head."""
    hidden, heads, kv_heads, width, experts, inner, vocab = 2048, 32, 4, 128, 128, 768, 151936
    if tiny:
        hidden, heads, kv_heads, width, experts, inner, vocab = 16, 4, 2, 8, 4, 8, 101
    layer = [
        (heads * width, hidden),
        (kv_heads * width, hidden),
        (kv_heads * width, hidden),
        (hidden, heads * width),
        (width,),
        (width,),
        (hidden,),
        (hidden,),
        (experts, hidden),
        (experts, 2 * inner, hidden),
        (experts, hidden, inner),
    ]
    return [(vocab, hidden), *layer * layers, (hidden,), (vocab, hidden)]


def parameters(layers: int, tiny: bool) -> list[torch.nn.Parameter]:
    made = [
        torch.nn.Parameter(torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)) for shape in shapes(layers, tiny)
    ]
    for parameter in made:
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3)
    return made


def fits(layers: int, tiny: bool) -> bool:
    """Whether weights, gradients and two states fit, with a tenth of the memory left."""
    if DEVICE == "cpu":
        return True
    needed = 8 * sum(math.prod(shape) for shape in shapes(layers, tiny))
    return needed < 0.9 * torch.cuda.get_device_properties(0).total_memory


def copy_rate(tiny: bool) -> float:
    """Bytes per ms, read and written, of one large copy."""
    source = torch.empty(2**16 if tiny else 2**32, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), 10)


def arms(params: list[torch.nn.Parameter]) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(arm, its parts); each arm's states are freed before the next one's are made."""
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
    stock = torch.optim.AdamW(params, **options, fused=True)

    def stock_clip() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP)

    yield "torch", {"clip": stock_clip, "step": stock.step, "both": lambda: (stock_clip(), stock.step())}
    stock.state.clear()
    ours, folded = AdamW(params, **options), AdamW(params, **options, max_grad_norm=CLIP)
    folded.state = ours.state
    yield "expertmesh", {"clip": lambda: grad_norm(params), "step": ours.step, "both": folded.step}
    ours.state.clear()


def rows(tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    rate = copy_rate(tiny)
    yield {"copy_tb_per_s": round(rate / 1e9, 3)}
    for layers in (1, 2) if tiny else (8, 24):
        if not fits(layers, tiny):
            yield {"layers": layers, "skipped": "weights, gradients and states do not fit"}
            continue
        params = parameters(layers, tiny)
        count = sum(parameter.numel() for parameter in params)
        for arm, parts in arms(params):
            for part, run in parts.items():
                ms, cpu_ms = medians_ms(run, repeats)
                share = round(PARTS[part] * count / rate / ms, 3)
                size = {"layers": layers, "parameters": count, "tensors": len(params)}
                yield {**size, "arm": arm, "part": part, "ms": round(ms, 3), "cpu_ms": round(cpu_ms, 3), "share": share}
        del params


def sweep(tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """[ms, share, chunk, options] of each kernel's candidates, best first."""
    rate, params = copy_rate(tiny), parameters(1 if tiny else 8, tiny)
    count = sum(parameter.numel() for parameter in params)
    optimizer, grads = AdamW(params, lr=1e-5), [parameter.grad for parameter in params]
    kernels = {
        "adamw": (adamw, optimizer.step, 14, [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)]),
        "squared_sum": (
            clip,
            lambda: squared_sum(grads),
            2,
            [(2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)],
        ),
    }
    shipped = tensor_lists.CHUNK
    for name, (module, run, size, tiles) in kernels.items():
        options, times = dict(module.OPTIONS), []
        for chunk, (block, warps) in itertools.product((2**14, 2**15, 2**16, 2**17), tiles):
            tensor_lists.CHUNK = chunk
            module.OPTIONS.update(BLOCK=block, num_warps=warps)
            ms = median_ms(run, repeats)
            times.append([round(ms, 3), round(size * count / rate / ms, 3), chunk, dict(module.OPTIONS)])
        module.OPTIONS.update(options)
        tensor_lists.CHUNK = shipped
        yield {"kernel": name, "shipped": [shipped, options], "best_first": sorted(times, key=lambda entry: entry[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--sweep", action="store_true", help="try every size of tile and chunk, and write nothing")
    parser.add_argument("--out", help="also write everything to this JSON file")
    parser.add_argument("--commit", help="the commit to record where there is no git repository")
    arguments = parser.parse_args()
    result = {**origin(["python", *sys.argv], arguments.commit, ("triton",)), "rows": []}
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}), flush=True)
    for row in (sweep if arguments.sweep else rows)(arguments.tiny, arguments.repeats):
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        if not arguments.sweep:
            write(result, arguments.out)  # a later one may fail


if __name__ == "__main__":
    main()
