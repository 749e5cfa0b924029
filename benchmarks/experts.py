"""Time the experts of one Qwen3-30B-A3B layer: stock's grouped_mm backend and ours, without and with adapters.

    python benchmarks/experts.py --out benchmarks/results/h200_experts.json
    python benchmarks/experts.py --only adapters --out benchmarks/results/h200_adapters.json

Random hidden states, bfloat16, 128 experts, top-8, widths 2,048 and 768; routing random or skewed by Zipf's law.
`expertmesh-triton` is ours without quack-kernels.

experts    the weights are trained
adapters   the weights are frozen, with adapters of rank 16 in float32, as low-rank products (`expertmesh`) and as
           PEFT's sum of full weights (`whole`); `without`: no adapters
kernel     each grouped Triton kernel

The floor counts 2·S·H·3I FLOPs in the forward (up and down products of S = T·K rows), twice that in the backward, half
of it if weights are frozen. Times are medians over series of five consecutive calls, each series after 20 ms of memory
writes.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from shared import DEVICE, DTYPE, FLOP_PER_MS, Case, Result, parser, time_cases
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh import backends
from expertmesh.kernels import grouped_gemm, grouped_grads
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouped_gemm import Weights
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.moe.experts import experts_forward
from expertmesh.moe.lora import factor_of

QUEUED, LEAD = 5, 20
NAMES, RANK = ("gate_up_proj", "down_proj"), 16


def routing(tokens: int, experts: int, top_k: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weights, ids) of `top_k` experts for each token."""
    logits = torch.randn(tokens, experts, device=DEVICE)
    if kind == "zipf":
        logits -= torch.log(torch.arange(1, experts + 1, device=DEVICE).float())[torch.randperm(experts, device=DEVICE)]
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights.to(DTYPE), ids


def by_triton(fn: Callable) -> Callable:
    """Return `fn` without quack-kernels."""

    def run(*inputs: Any) -> Any:
        with mock.patch.object(backends, "has_quack", lambda _: False):
            return fn(*inputs)

    return run


def native(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *adapters: torch.Tensor) -> Any:
    """Run the experts with low-rank products, including the preparation of the factors."""
    experts = len(module.down_proj)
    sides = [
        factor_of(adapter, bool(n % 2), 1.0 + n % 2, experts, slice(None), DTYPE) for n, adapter in enumerate(adapters)
    ]
    module.low_rank = {NAMES[0]: sides[:2], NAMES[1]: sides[2:]}
    try:
        return experts_forward(module, x, ids, weights)
    finally:
        del module.low_rank


def whole(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *adapters: torch.Tensor) -> Any:
    """Run the experts after computing W + 2 · B · A in one operation, as PEFT does."""
    kept = {name: module._parameters.pop(name) for name in NAMES}
    for name, a, b in zip(NAMES, adapters[::2], adapters[1::2], strict=True):
        experts = len(kept[name])
        rows, columns = b.view(len(b), -1, experts).permute(2, 0, 1), a.view(experts, -1, a.shape[1])
        vars(module)[name] = torch.baddbmm(kept[name], rows.to(DTYPE), columns.to(DTYPE), alpha=2.0)
    try:
        return experts_forward(module, x, ids, weights)
    finally:
        for name, weight in kept.items():
            del vars(module)[name]
            module._parameters[name] = weight


def layer_cases(module: Any, sizes: tuple[int, ...], top_k: int) -> Iterator[Case]:
    experts, hidden, width = module.down_proj.shape
    sides = (RANK * experts, hidden), (2 * width, RANK * experts), (RANK * experts, width), (hidden, RANK * experts)

    def arm(fn: Callable, ids: torch.Tensor, adapters: bool = False) -> Callable:
        return lambda x, weights, *rest: fn(module, x, ids, weights, *(rest if adapters else ()))

    for tokens in sizes:
        flops = 2 * tokens * top_k * hidden * 3 * width / FLOP_PER_MS
        x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE).requires_grad_()
        for kind in ("random", "zipf"):
            weights, ids = routing(tokens, experts, top_k, kind)
            arms = {"stock": grouped_mm_experts_forward, "expertmesh": experts_forward}
            found = {name: arm(fn, ids) for name, fn in arms.items()}
            found["expertmesh-triton"] = by_triton(found["expertmesh"])
            inputs = x, weights.requires_grad_(), *module.requires_grad_().parameters()
            yield Case(f"experts, {kind} {tokens}", found, inputs, (flops, 2 * flops))
        weights, ids = routing(tokens, experts, top_k, "random")
        module.requires_grad_(False)
        adapters = [(torch.randn(side, device=DEVICE) * 0.02).requires_grad_() for side in sides]
        found = {"expertmesh": arm(native, ids, True), "whole": arm(whole, ids, True)}
        found["without"] = arm(experts_forward, ids)
        yield Case(f"adapters, {tokens}", found, (x, weights.requires_grad_(), *adapters), (flops, flops))


def kernel_cases(module: Any, tokens: int, top_k: int) -> Iterator[Case]:
    """Each grouped Triton kernel of a layer. Tensors of the right shape stand for gradients."""
    w_up_EHJ, w_down_EIH = module.gate_up_proj.detach().transpose(1, 2), module.down_proj.detach().transpose(1, 2)
    experts, hidden, _ = w_up_EHJ.shape
    weights, ids = routing(tokens, experts, top_k, "random")
    group, act = group_by_expert(ids, experts, weights), Activation("silu")
    x_TH, dout_TH = (torch.randn(tokens, hidden, device=DEVICE).to(DTYPE) for _ in range(2))
    up, down = Weights(w_up_EHJ), Weights(w_down_EIH)
    up_back, down_back = Weights(w_up_EHJ.transpose(1, 2)), Weights(w_down_EIH.transpose(1, 2))
    h_SJ, a_SI, _ = grouped_gemm.up_act(x_TH, up, group, act)
    wgrad, gemm = grouped_grads.grouped_wgrad, grouped_gemm.grouped_gemm
    small = 2 * a_SI.numel() * hidden / FLOP_PER_MS
    for name, run, floor in (
        ("up_act", lambda: grouped_gemm.up_act(x_TH, up, group, act), 2 * small),
        ("down", lambda: gemm(a_SI, down, group), small),
        ("down_dact", lambda: grouped_grads.down_dact(dout_TH, down_back, h_SJ, group, act), small),
        ("up_dgrad", lambda: gemm(h_SJ, up_back, group), 2 * small),
        ("up_wgrad", lambda: wgrad(x_TH, h_SJ, group, w_up_EHJ), 2 * small),
        ("down_wgrad", lambda: wgrad(dout_TH, a_SI, group, down_back.w), small),
    ):
        yield Case(f"kernel {name}", {"expertmesh": by_triton(run)}, (), (floor, 0))


def main() -> None:
    options = parser(__doc__, repeats=9, cases=True).parse_args()
    experts, hidden, width, top_k = (4, 16, 8, 2) if options.tiny else (128, 2048, 768, 8)
    sizes = (16, 24) if options.tiny else (4096, 16384)
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=width)
    with torch.device(DEVICE):
        module = Qwen3MoeExperts(config).to(DTYPE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    result = Result(options, ("triton", "transformers", "quack-kernels", "peft"))
    for cases in (layer_cases(module, sizes, top_k), kernel_cases(module, sizes[-1], top_k)):
        time_cases(result, cases, options, QUEUED, LEAD)


if __name__ == "__main__":
    main()
