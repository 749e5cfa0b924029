"""A small Qwen3-MoE on two CPU threads, float32: stock Transformers and expertmesh, in turn, in one job.

    python benchmarks/cpu.py --out benchmarks/results/cpu_qwen3_moe_avx2.json

Same weights, same tokens. The arms alternate, round after round, because other programs may share the cores: the
median of the rounds is each arm's time, the shortest round is kept beside it.
"""

import gc
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from shared import Result, parser
from transformers import AutoModelForCausalLM as StockAuto
from transformers import Qwen3MoeConfig

from expertmesh import AutoModelForCausalLM

CONFIG = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4,
    norm_topk_prob=True, max_position_embeddings=4096, use_cache=False,
)  # fmt: skip
TINY = CONFIG | dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2)
ARMS: dict[str, tuple[Any, dict[str, str]]] = {
    "stock-eager": (StockAuto, {"experts_implementation": "eager"}),
    "stock": (StockAuto, {"experts_implementation": "grouped_mm"}),
    "expertmesh": (AutoModelForCausalLM, {}),
}


def build(config: dict[str, Any]) -> dict[str, Any]:
    """One model per arm, all with the same weights."""
    torch.manual_seed(0)
    models = {
        arm: auto.from_config(Qwen3MoeConfig(**config), dtype=torch.float32, **options).train()
        for arm, (auto, options) in ARMS.items()
    }
    for model in models.values():
        model.load_state_dict(models["stock"].state_dict())
    return models


def step(model: Any, ids: torch.Tensor) -> tuple[float, float, float]:
    """(forward ms, backward ms, loss) of one training step without optimizer."""
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    middle = time.perf_counter()
    loss.backward()
    return (middle - begin) * 1e3, (time.perf_counter() - middle) * 1e3, loss.item()


def measure(models: dict[str, Any], ids: torch.Tensor, rounds: int, warmup: int = 2) -> dict[str, list[tuple]]:
    """`rounds` steps of every arm, one step of each in turn."""
    steps: dict[str, list[tuple]] = {arm: [] for arm in models}
    gc.disable()
    for i in range(warmup + rounds):
        for arm, model in models.items():
            result = step(model, ids)
            if i >= warmup:
                steps[arm].append(result)
    gc.enable()
    return steps


def row(arm: str, steps: list[tuple], layers: int, batch: int, seq: int) -> dict[str, Any]:
    times = [forward + backward for forward, backward, _ in steps]
    median = statistics.median(times)
    return {
        "work": "small qwen3-moe, float32", "arm": arm, "layers": layers, "batch": batch, "seq": seq,
        "routing": "random-init", "forward_ms": round(statistics.median(s[0] for s in steps), 1),
        "backward_ms": round(statistics.median(s[1] for s in steps), 1), "both_ms": round(median, 1),
        "both_shortest_ms": round(min(times), 1), "tokens_per_second": round(batch * seq / median * 1e3),
        "loss": steps[-1][2],
    }  # fmt: skip


def hardware() -> str:
    """The processor's name, cores and vector instructions; `platform` knows the name on other systems than Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    name = (names[0] if names else platform.processor() or platform.machine()).strip()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    options = parser(__doc__, repeats=21)
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    config, batch, seq = (TINY, 1, 32) if options.tiny else (CONFIG, 8, 256)
    models = build(config)
    ids = torch.randint(0, config["vocab_size"], (batch, seq))
    steps = measure(models, ids, options.repeats)
    result = Result(options, hardware=hardware(), gpus=0, threads=options.threads)
    for arm in models:
        result.add(row(arm, steps[arm], config["num_hidden_layers"], batch, seq))


if __name__ == "__main__":
    main()
