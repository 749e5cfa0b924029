"""Adapters on the experts of one Qwen3-30B-A3B layer, whose weights are frozen: what they cost, and each part of that.

    python benchmarks/adapters.py --out benchmarks/results/h200_adapters.json

Random hidden states and routing, bfloat16, 128 experts, top-8, widths 2,048 and 768, adapters of rank 16 in float32.
Arms: no adapters (`expertmesh-triton`: without quack-kernels), products of low rank (`native`), and the sum of whole
weights as PEFT makes it (`whole`). `kernels`: the parts of `native`, with the bytes of their wide operand per second.
Medians of rows of five calls, each row behind 20 ms of memory writes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from experts import LEAD, QUEUED, by_triton, routing
from shared import DEVICE, DTYPE, Result, forward_backward, median_ms, parser
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertmesh import backends
from expertmesh.kernels import grouped_down, grouped_gemm
from expertmesh.kernels.activation import Activation
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.kernels.low_rank import LowRank
from expertmesh.kernels.thin import thin_rows, thin_wgrad
from expertmesh.moe.experts import experts_forward
from expertmesh.moe.lora import factor_of

NAMES = "gate_up_proj", "down_proj"


def native(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *adapters: torch.Tensor) -> Any:
    """By products of low rank, the making of the factors included."""
    experts = len(module.down_proj)
    sides = [factor_of(adapter, bool(n % 2), 2.0, experts, slice(None), DTYPE) for n, adapter in enumerate(adapters)]
    module.low_rank = {NAMES[0]: sides[:2], NAMES[1]: sides[2:]}
    try:
        return experts_forward(module, x, ids, weights)
    finally:
        del module.low_rank


def whole(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *adapters: torch.Tensor) -> Any:
    """W + 2 · B · A first, in PEFT's one operation."""
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


ARMS: dict[str, Callable] = {
    "expertmesh": lambda *inputs: experts_forward(*inputs[:4]),
    "expertmesh-triton": lambda *inputs: by_triton(*inputs[:4]),
    "native": native,
    "whole": whole,
}


def kernels(module: Any, tokens: int, top_k: int, rank: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each part: name -> (run, elements of its wide operand)."""
    w_up_EHJ, w_down_EIH = module.gate_up_proj.detach().transpose(1, 2), module.down_proj.detach().transpose(1, 2)
    experts, hidden, columns = w_up_EHJ.shape
    width, rows = columns // 2, tokens * top_k
    weights, ids = routing(tokens, experts, top_k, "random")
    group, act = group_by_expert(ids, experts, weights), Activation("silu")
    x_TH, h_SJ, a_SI, u_SR = (
        torch.randn(*shape, device=DEVICE).to(DTYPE)
        for shape in ((tokens, hidden), (rows, columns), (rows, width), (rows, rank))
    )
    by_H, by_J, by_I = (torch.randn(experts, rank, n, device=DEVICE).to(DTYPE) for n in (hidden, columns, width))
    wide = {"H": (x_TH, by_H, True), "J": (h_SJ, by_J, False), "I": (a_SI, by_I, False)}
    found = {}
    for name, (x, factor, gathered) in wide.items():
        elements = rows * factor.shape[2]
        found[f"thin_rows {name}"] = partial(thin_rows, x, factor, group, gathered), elements
        found[f"thin_wgrad {name}"] = partial(thin_wgrad, x, u_SR, factor, group, gathered), elements
    for low in (None, LowRank):
        to_J, to_I, to_H = (low and low(u_SR, factor) for factor in (by_J, by_I, by_H))
        name = "with adapters" if low else "without"
        found |= {
            f"up_act {name}": (partial(grouped_gemm.up_act, x_TH, w_up_EHJ, None, group, act, to_J), h_SJ.numel()),
            f"down {name}": (partial(grouped_gemm.grouped_gemm, a_SI, w_down_EIH, group, low=to_H), a_SI.numel()),
            f"down_dact {name}": (
                partial(grouped_down.down_dact, x_TH, w_down_EIH, h_SJ, group, act, low=to_I),
                h_SJ.numel(),
            ),
            f"up_dgrad {name}": (
                partial(grouped_gemm.grouped_gemm, h_SJ, w_up_EHJ.transpose(1, 2), group, low=to_H),
                h_SJ.numel(),
            ),
        }
    return found


def main() -> None:
    options = parser(__doc__, repeats=9).parse_args()
    experts, hidden, width, top_k = (4, 16, 8, 2) if options.tiny else (128, 2048, 768, 8)
    config, rank = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=width), 16
    torch.manual_seed(0)
    with torch.device(DEVICE):
        module = Qwen3MoeExperts(config).to(DTYPE).requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sides = (rank * experts, hidden), (2 * width, rank * experts), (rank * experts, width), (hidden, rank * experts)
    adapters = [(torch.randn(side, device=DEVICE) * 0.02).requires_grad_() for side in sides]
    result = Result(options, ("triton", "transformers", "quack-kernels", "peft"), kernels={})
    sizes = (16, 24) if options.tiny else (4096, 16384)
    for tokens in sizes:
        weights, ids = routing(tokens, experts, top_k, "random")
        x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE).requires_grad_()
        for arm, forward in ARMS.items():

            def run(x: Any, weights: Any, *adapters: Any, forward: Any = forward, ids: Any = ids) -> Any:
                return forward(module, x, ids, weights, *adapters)

            times = forward_backward(run, (x, weights.requires_grad_(), *adapters), options.repeats, QUEUED, LEAD)
            result.add({"arm": arm, "tokens": tokens} | {f"{name}_ms": round(ms, 3) for name, (ms, _) in times.items()})
    with mock.patch.object(backends, "has_quack", lambda _: False):
        for name, (run, elements) in kernels(module, sizes[-1], top_k, rank).items():
            ms = median_ms(run, options.repeats, QUEUED, LEAD)
            gb_per_s = round(elements * torch.finfo(DTYPE).bits / 8 / ms / 1e6)
            result.content["kernels"][name] = {"ms": round(ms, 3), "gb_per_s": gb_per_s}
            result.save()


if __name__ == "__main__":
    main()
