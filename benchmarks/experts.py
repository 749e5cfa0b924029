"""The experts of one Qwen3-30B-A3B layer alone: stock's grouped_mm backend and ours, forward and backward.

    python benchmarks/experts.py --out benchmarks/results/h200_experts.json

Random hidden states, bfloat16, 128 experts, top-8, widths 2,048 and 768; routing random or skewed by Zipf's law.
`expertmesh-triton` is ours without quack-kernels. FLOPs: 2·S·H·3I forward (up and down products of S = T·K rows), twice
that backward. Medians of rows of five calls, as layers follow each other, each row behind 20 ms of memory writes.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from shared import DEVICE, DTYPE, Result, forward_backward, median_ms, parser
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh import backends
from expertmesh.kernels import grouped_down, grouped_gemm, grouped_wgrad
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.moe.experts import experts_forward

QUEUED, LEAD = 5, 20


def routing(tokens: int, experts: int, top_k: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids) of `top_k` experts for each token."""
    logits = torch.randn(tokens, experts, device=DEVICE)
    if kind == "zipf":
        logits -= torch.log(torch.arange(1, experts + 1, device=DEVICE).float())[torch.randperm(experts, device=DEVICE)]
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights.to(DTYPE), ids


def by_triton(*inputs: Any) -> torch.Tensor:
    """Ours without quack-kernels."""
    with mock.patch.object(backends, "has_quack", lambda _: False):
        return experts_forward(*inputs)


ARMS: dict[str, Callable] = {
    "stock": grouped_mm_experts_forward, "expertmesh": experts_forward, "expertmesh-triton": by_triton,
}  # fmt: skip


def layers(module: Any, sizes: tuple[int, ...], top_k: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens, routing and arm."""
    experts, hidden, width = len(module.down_proj), module.down_proj.shape[1], module.down_proj.shape[2]
    for tokens, kind, arm in itertools.product(sizes, ("random", "zipf"), ARMS):
        torch.manual_seed(0)
        weights, ids = routing(tokens, experts, top_k, kind)
        x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE).requires_grad_()
        leaves = x, weights.requires_grad_(), *module.parameters()
        run = partial(lambda fn, ids, x, weights, *_: fn(module, x, ids, weights), ARMS[arm], ids)
        both_ms = forward_backward(run, leaves, repeats, QUEUED, LEAD)["both"][0]
        with torch.no_grad():
            forward_ms = median_ms(lambda run=run, leaves=leaves: run(*leaves), repeats, QUEUED, LEAD)
        flops = 2 * tokens * top_k * hidden * 3 * width
        yield {
            "arm": arm, "tokens": tokens, "routing": kind,
            "forward_ms": round(forward_ms, 3), "both_ms": round(both_ms, 3),
            "forward_tflops": round(flops / forward_ms / 1e9, 1),
            "both_tflops": round(3 * flops / both_ms / 1e9, 1),
        }  # fmt: skip


def kernels(module: Any, tokens: int, top_k: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each grouped Triton kernel of a layer: name -> (run, FLOPs). Tensors of the right shape stand for gradients."""
    w_up_EHJ, w_down_EIH = module.gate_up_proj.detach().transpose(1, 2), module.down_proj.detach().transpose(1, 2)
    experts, hidden, _ = w_up_EHJ.shape
    weights, ids = routing(tokens, experts, top_k, "random")
    group, act = group_by_expert(ids, experts, weights), Activation("silu")
    x_TH, dout_TH = (torch.randn(tokens, hidden, device=DEVICE).to(DTYPE) for _ in range(2))
    h_SJ, a_SI, _ = grouped_gemm.up_act(x_TH, w_up_EHJ, None, group, act)
    small = 2 * a_SI.numel() * hidden
    wgrad = grouped_wgrad.grouped_wgrad
    return {
        "up_act": (lambda: grouped_gemm.up_act(x_TH, w_up_EHJ, None, group, act), 2 * small),
        "down": (lambda: grouped_gemm.grouped_gemm(a_SI, w_down_EIH, group), small),
        "down_dact": (lambda: grouped_down.down_dact(dout_TH, w_down_EIH, h_SJ, group, act), small),
        "up_dgrad": (lambda: grouped_gemm.grouped_gemm(h_SJ, w_up_EHJ.transpose(1, 2), group), 2 * small),
        "up_wgrad": (lambda: wgrad(x_TH, h_SJ, group, w_up_EHJ), 2 * small),
        "down_wgrad": (lambda: wgrad(dout_TH, a_SI, group, w_down_EIH.transpose(1, 2)), small),
    }


def main() -> None:
    options = parser(__doc__, repeats=9).parse_args()
    experts, hidden, width, top_k = (4, 16, 8, 2) if options.tiny else (128, 2048, 768, 8)
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=width)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        module = Qwen3MoeExperts(config).to(DTYPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    result = Result(options, ("triton", "transformers", "quack-kernels"), kernels={})
    for row in layers(module, (16, 24) if options.tiny else (4096, 16384), top_k, options.repeats):
        result.add(row)
    with mock.patch.object(backends, "has_quack", lambda _: False):
        measured = {
            name: (median_ms(run, options.repeats, QUEUED, LEAD), flops)
            for name, (run, flops) in kernels(module, 24 if options.tiny else 16384, top_k).items()
        }
    for name, (ms, flops) in measured.items():
        result.content["kernels"][name] = {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)}
        result.save()


if __name__ == "__main__":
    main()
