"""Adapters on experts in 4 bits: how fast a stack is decoded, and whole steps of people's loops, on one GPU.

    python benchmarks/four_bit.py --layers 48 --batch 4 --recompute --out benchmarks/results/h200_four_bit.json
    python benchmarks/four_bit.py --model gpt-oss-120b --formats mxfp4 --batch 1 --recompute

Random weights, packed as they are drawn, so that no model is in memory unpacked; adapters of rank 16 on attention and
experts; S=4096. `decode`: milliseconds and bytes per second, read and written, of both stacks of a layer, and of a copy
of as many bytes as are written. `rows`: as of `expertmesh bench --loop`; `made_gib` is the peak of making the model.
The format `bf16` is the model without quantization. Without a GPU it is a tiny model.
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, interpreted, median_ms, parser, policy_of
from transformers import PreTrainedConfig

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.bench import loops
from expertmesh.bench.arms import ARMS
from expertmesh.bench.works import WORKS, config_of, expert_widths, top_k_and_experts
from expertmesh.kernels import four_bit
from expertmesh.parallel.setup import recompute

MODELS = {"qwen3-30b-a3b": (48, {}), "gpt-oss-20b": (24, {}), "gpt-oss-120b": (36, {"num_local_experts": 128})}
TINY = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}


def config_for(model: str, layers: int | None, tiny: bool) -> PreTrainedConfig:
    """The configuration of a model, with all its layers or the first few."""
    work = WORKS[model.replace("120b", "20b")]
    count, changes = MODELS[model]
    if tiny:
        return config_of(work, layers, True, use_cache=True, vocab_size=loops.VOCABULARY, **TINY)
    return config_of(work, layers or count, use_cache=True, **changes)


def decode(config: PreTrainedConfig, format: str, repeats: int) -> dict[str, Any]:
    """How long the stacks of a layer take."""
    (hidden, up), (_, experts) = expert_widths(config), top_k_and_experts(config)
    row: dict[str, Any] = {"format": format}
    for name, shape in {"up": (experts, up, hidden), "down": (experts, hidden, up // 2)}.items():
        codes, scales = four_bit.empty(format, shape, torch.device(DEVICE))
        codes.random_(0, 256)
        scales.fill_(1)
        out = torch.empty(shape, dtype=DTYPE, device=DEVICE)
        ms = median_ms(lambda c=codes, s=scales, o=out: four_bit.decode(c, s, format, o), repeats)
        moved = codes.nbytes + scales.nbytes + out.nbytes
        copied = torch.empty_like(out)
        copy_ms = median_ms(lambda c=copied, o=out: c.copy_(o), repeats)
        row |= {f"{name}_ms": round(ms, 3), f"{name}_tb_per_s": round(moved / ms / 1e9, 3)}
        row[f"{name}_copy_ms"] = round(copy_ms, 3)
        del codes, scales, out, copied
    return row


def train(options: Any, format: str, batch: int) -> dict[str, Any]:
    """Whole steps of a loop."""
    on_gpu = DEVICE == "cuda"
    config = config_for(options.model, options.layers, options.tiny)
    quantization = {} if format == "bf16" else {"quantization_config": ExpertsQuantConfig(format)}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, **quantization).train()
    made = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    recompute(model, options.recompute)
    loop = replace(loops.LOOPS[options.loop], lora=True, experts=True)
    arm = ARMS["expertmesh-trainer" if options.own_trainer else "expertmesh"]
    seq, warmup = (32, 1) if options.tiny else (options.seq, loops.WARMUP)
    found = loops.measure(loop, arm, model, batch, seq, warmup, options.repeats)
    row = {"model": options.model, "layers": config.num_hidden_layers, "format": format, "loop": options.loop}
    return row | {"arm": arm.name, "batch": batch, "seq": seq, "recompute": options.recompute, "made_gib": made} | found


def main() -> None:
    options = parser(__doc__, repeats=12)
    options.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    options.add_argument("--layers", type=int, help="default: all")
    options.add_argument("--batch", type=int, nargs="*", default=[4], help="without a number: decode alone")
    options.add_argument("--seq", type=int, default=4096)
    options.add_argument("--formats", nargs="+", default=["nf4"], choices=["nf4", "mxfp4", "bf16"])
    options.add_argument("--loop", choices=["lora-experts", "sft-packed"], default="lora-experts")
    options.add_argument("--own-trainer", action="store_true", help="ours instead of transformers' or TRL's")
    options.add_argument("--recompute", nargs="?", const=True, default=False, type=policy_of, help="light, experts...")
    options = options.parse_args()
    result = Result(options, ("triton", "transformers", "trl", "peft"))
    config = config_for(options.model, options.layers, options.tiny)
    with interpreted():
        for format in options.formats:
            if format != "bf16":
                result.add(decode(config, format, options.repeats), "decode")
        for batch in options.batch:
            for format in options.formats:
                result.add(train(options, format, batch))
                gc.collect()
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
