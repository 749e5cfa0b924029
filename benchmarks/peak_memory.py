"""What stands on one GPU when a step's memory is highest: ours, stock's and the planner's, for shapes of few tokens.

    python benchmarks/peak_memory.py --out benchmarks/results/h200_peak_memory.json
    python benchmarks/peak_memory.py --show 16        # and the largest tensors at the peak, with who made them

Forward and backward with random weights. Shapes: Mixtral's widths, two layers, 2 x 4096 tokens; GLM-4.5's, two dense
layers and one of experts, 1 x 4096; Qwen3-30B-A3B's, eight layers, 1 x 4096. Without a GPU they are tiny.
"""

import gc
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, parser
from transformers import Glm4MoeConfig, MixtralConfig, PreTrainedConfig

import expertmesh
from expertmesh.bench.works import WORKS, config_of
from expertmesh.plan.memory import GIB, Job, trace

STEPS = 3


def shapes(tiny: bool) -> dict[str, tuple[PreTrainedConfig, int]]:
    """{name: (configuration, rows of tokens)}"""
    small = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
    glm = dict(hidden_size=5120, num_attention_heads=96, num_key_value_heads=8, vocab_size=151552)
    glm |= dict(intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, head_dim=128)
    if tiny:
        glm = small | dict(moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, head_dim=16)
    return {
        "mixtral": (MixtralConfig(num_hidden_layers=2, **(small if tiny else {})), 2),
        "glm-4.5": (Glm4MoeConfig(num_hidden_layers=3, first_k_dense_replace=2, **glm), 1),
        "qwen3-30b-a3b": (config_of(WORKS["qwen3-30b-a3b"], 8, tiny), 1),
    }


def peak_of(config: PreTrainedConfig, batch: int, seq: int, fused: bool, show: int) -> float | None:
    """GiB at the peak of the last of some steps; prints what stands there."""
    on_gpu = DEVICE == "cuda"
    if on_gpu and show:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=10**6)
    with torch.device(DEVICE):
        model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=DTYPE, fused=fused).train()
    ids = torch.randint(3, config.vocab_size, (batch, seq), device=DEVICE)
    seen = 0
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            seen = len(torch.cuda.memory._snapshot()["device_traces"][0]) if show else 0
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if not on_gpu:
        return None
    if show:
        for line in standing(torch.cuda.memory._snapshot()["device_traces"][0], seen)[:show]:
            print(line, flush=True)
        torch.cuda.memory._record_memory_history(enabled=None)
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def standing(events: list[dict[str, Any]], since: int) -> list[str]:
    """The tensors that stand at the highest point behind the event `since`, largest first."""
    alive: dict[int, dict[str, Any]] = {}
    now, most, there = 0, 0, {}
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            alive[event["addr"]] = event
            now += event["size"]
            if number >= since and now > most:
                most, there = now, dict(alive)
        elif event["action"] == "free_requested" and event["addr"] in alive:
            now -= alive.pop(event["addr"])["size"]
    largest = sorted(there.values(), key=lambda event: -event["size"])
    return [f"  {event['size'] / GIB:7.3f}  {_who(event['frames'])}" for event in largest]


def _who(frames: list[dict[str, Any]]) -> str:
    shown = [f"{frame['filename'].rpartition('/')[2]}:{frame['line']}:{frame['name']}" for frame in frames]
    return " < ".join(shown[:4])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--show", type=int, default=0, help="so many tensors at the peak")
    options = options.parse_args()
    result, seq = Result(options), 64 if options.tiny else 4096
    for name, (config, batch) in shapes(options.tiny).items():
        for arm, fused in (("expertmesh", True), ("stock", False)):
            found = peak_of(config, batch, seq, fused, options.show)
            row = {"shape": name, "arm": arm, "batch": batch, "seq": seq, "peak_gib": found}
            if fused:
                planned = trace(Job(config, batch, seq, dtype=DTYPE), 140 * GIB).peak
                row["planned_gib"] = round(sum(planned.values()) / GIB, 2)
            result.add(row)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
