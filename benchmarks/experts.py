"""The experts of one Qwen3-30B-A3B layer alone: stock's grouped_mm path and ours, TFLOP/s forward and backward.

    python benchmarks/experts.py --out benchmarks/results/NAME.json
    python benchmarks/experts.py --sweep        # tile configurations of each kernel, to find better ones

Random hidden states, bfloat16, 128 experts, top-8, widths 2048 and 768; routing random or Zipf-skewed. FLOPs: 2·S·H·3I
forward (up and down products of S = T·K rows), twice that backward. Medians of CUDA events. Each grouped kernel alone
stands beside that of quack-kernels where that is installed (`experts_quack`).
"""

import argparse
import importlib.util
import itertools
import sys
from dataclasses import dataclass
from functools import partial
from unittest import mock

import experts_quack
import timing
import torch
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh import backends
from expertmesh.bench.origin import origin, write
from expertmesh.kernels import grouped_down, grouped_gemm, grouped_wgrad
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import Grouping, group_by_expert
from expertmesh.moe.experts import experts_forward

EXPERTS, HIDDEN, WIDTH, TOP_K = 128, 2048, 768, 8
LEAD = 20  # milliseconds of moving memory before a row: a GPU at its limit of power recovers


def median_ms(run, repeats, lead=LEAD):
    """Milliseconds of a call among five queued one behind the other, as layers are, after `lead` of moving memory."""
    return timing.median_ms(run, repeats, queued=5, lead=lead)


def routing(tokens, kind):
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    if kind == "zipf":
        logits -= torch.log(torch.arange(1, EXPERTS + 1, device="cuda").float())[torch.randperm(EXPERTS, device="cuda")]
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return weights.bfloat16(), ids


def experts():
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module.bfloat16()


def by_triton(*inputs):
    """Ours without quack."""
    with mock.patch.object(backends, "has_quack", lambda _: False):
        return experts_forward(*inputs)


def measure(module, forward, tokens, kind, time):
    weights, ids = routing(tokens, kind)
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights.requires_grad_()
    dout = torch.randn_like(x)
    leaves = (x, weights, *module.parameters())

    def both():
        torch.autograd.grad(forward(module, x, ids, weights), leaves, dout)

    with torch.no_grad():
        forward_ms = time(lambda: forward(module, x, ids, weights))
    both_ms = time(both)
    flops = 2 * tokens * TOP_K * HIDDEN * 3 * WIDTH
    return {
        "forward_ms": round(forward_ms, 3),
        "both_ms": round(both_ms, 3),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "both_tflops": round(3 * flops / both_ms / 1e9, 1),
    }


@dataclass(frozen=True)
class Operands:
    """What the grouped kernels of one layer read: T tokens, S = T * top-k rows sorted by expert."""

    x_TH: torch.Tensor
    dout_TH: torch.Tensor
    w_up_EHJ: torch.Tensor
    w_down_EIH: torch.Tensor
    h_SJ: torch.Tensor
    a_SI: torch.Tensor
    group: Grouping
    act: Activation


def operands(module, tokens=16384, kind="random"):
    weights, ids = routing(tokens, kind)
    group = group_by_expert(ids, len(module.gate_up_proj), weights)
    x = torch.randn(tokens, module.gate_up_proj.shape[2], device=weights.device, dtype=weights.dtype)
    w_up, w_down = module.gate_up_proj.detach().transpose(1, 2), module.down_proj.detach().transpose(1, 2)
    act = Activation("silu")
    h, a = grouped_gemm.up_act(x, w_up, None, group, act)
    return Operands(x, torch.randn_like(x), w_up, w_down, h, a, group, act)


def kernels(o):
    """Each grouped kernel: name -> (run, FLOPs). Where gradients belong stand other tensors of their shapes."""
    w_up_EJH = o.w_up_EHJ.transpose(1, 2)
    (rows, width), hidden, group = o.a_SI.shape, o.x_TH.shape[1], o.group
    small, large = 2 * rows * hidden * width, 4 * rows * hidden * width
    return {
        "up_act": (lambda: grouped_gemm.up_act(o.x_TH, o.w_up_EHJ, None, group, o.act), large),
        "down": (lambda: grouped_gemm.grouped_gemm(o.a_SI, o.w_down_EIH, group), small),
        "down_dact": (
            lambda: grouped_down.down_dact(o.dout_TH, o.w_down_EIH, o.h_SJ, group, o.act),
            small,
        ),
        "up_dgrad": (lambda: grouped_gemm.grouped_gemm(o.h_SJ, w_up_EJH, group), large),
        "up_wgrad": (lambda: grouped_wgrad.grouped_wgrad(o.x_TH, o.h_SJ, group, gathered_first=False), large),
        "down_wgrad": (lambda: grouped_wgrad.grouped_wgrad(o.dout_TH, o.a_SI, group, gathered_first=True), small),
    }


def results_of(name, run):
    """What a kernel of ours computes, as tuple; the parts of the routing weights' gradient added up."""
    found = run()
    if name == "down_dact":
        dh, wa, dweight_PS, _ = found
        return dh, wa, dweight_PS.sum(0)
    return found if isinstance(found, tuple) else (found,)


ROW_TILES = [
    (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (128, 32, 8, 4), (128, 64, 4, 3), (64, 64, 8, 3), (64, 64, 4, 4),
]  # fmt: skip
WGRAD_TILES = [
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 8, 4),
    (128, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 256, 32, 8, 4),
]  # fmt: skip


def sweep(module):
    """Time every kernel under several tile configurations, the best first."""
    for name, (run, flops) in kernels(operands(module)).items():
        if "wgrad" in name:
            names, tiles, function = ("BG", "BC", "BK", "num_warps", "num_stages"), WGRAD_TILES, "wgrad_config"
        else:
            names, tiles, function = ("BN", "BK", "num_warps", "num_stages"), ROW_TILES, "tile_config"
        found = [_try(run, flops, function, dict(zip(names, tile, strict=True))) for tile in tiles]
        ranked = sorted((f for f in found if f), key=lambda f: -f[0])
        print(name, *(f"{tflops:.0f} TFLOP/s {config}" for tflops, config in ranked), sep="\n   ", flush=True)


def _try(run, flops, name, config):
    modules = [m for m in (grouped_gemm, grouped_down, grouped_wgrad) if hasattr(m, name)]
    before = [getattr(m, name) for m in modules]
    for m in modules:
        setattr(m, name, lambda *_, **__: dict(config))
    try:
        return flops / median_ms(run, repeats=5) / 1e9, config
    except Exception as error:  # a configuration that does not fit the chip is an answer too
        if "OutOfResources" not in type(error).__name__:
            print(f"   {config}: {type(error).__name__}")
        return None
    finally:
        for m, value in zip(modules, before, strict=True):
            setattr(m, name, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed rows of calls; 1 fills the caches of compilers")
    parser.add_argument("--lead", type=int, default=LEAD, help="milliseconds of moving memory before a row")
    parser.add_argument("--out", help="write the JSON here as well")
    parser.add_argument("--commit", help="default: that of the working tree")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    module = experts()
    if options.sweep:
        sweep(module)
        return
    packages = ("triton", "transformers", "quack-kernels")
    result = origin(["python", *sys.argv], options.commit, packages) | {"rows": [], "kernels": {}}
    time = partial(median_ms, repeats=options.repeats, lead=options.lead)
    arms = {"stock": grouped_mm_experts_forward, "expertmesh": experts_forward, "expertmesh-triton": by_triton}
    for tokens, kind, arm in itertools.product((4096, 16384), ("random", "zipf"), arms):
        found = measure(module, arms[arm], tokens, kind, time)
        row = {"arm": arm, "tokens": tokens, "routing": kind, **found}
        result["rows"].append(row)
        print(row, flush=True)
        write(result, options.out)
    alone(result, operands(module), time, lambda: write(result, options.out))


def alone(result, o, time, save):
    """Into `result`: every kernel, and right behind it quack's, if that is installed."""
    if importlib.util.find_spec("quack"):
        result["libraries"] = {"quack": {}}
    for name, (run, flops) in kernels(o).items():
        ms = time(run)
        result["kernels"][name] = {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)}
        print(name, result["kernels"][name], flush=True)
        save()
        for library in result.get("libraries", {}).values():
            library[name] = experts_quack.best(name, o, results_of(name, run), flops, time)
            for tried in library[name]["tried"]:
                print(name, "by quack", tried, flush=True)
            save()


if __name__ == "__main__":
    main()
