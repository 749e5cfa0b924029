"""Whole training steps with and without gradients that stand: milliseconds and peak memory, on one GPU.

    python benchmarks/gradient_release.py --layers 8 --batch 4 --out benchmarks/results/h200_gradient_release.json

Qwen3-30B-A3B's widths, random weights, S=4096; forward, backward, clipping to 1.0 and AdamW, whose states have the
weights' dtype, or are kept as `--states` says, with `--offload` on the host. `--recompute` alone recomputes whole
layers; `light`, `experts` or, in the first n layers, `experts=n` recompute less. Arms: `ordinary` clips by the norm of
the standing gradients; `running` and `exact` are those of `GradientRelease`. Each starts from the same weights. The
peak is that of the timed steps. Without a GPU it is a tiny model.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from shared import DEVICE, DTYPE, Result, parser, policy_of

import expertmesh
from expertmesh.bench.works import WORKS, config_of
from expertmesh.parallel.setup import recompute

ARMS = "ordinary", "running", "exact"
WARM_UP = 3


def step_of(model: Any, arm: str, kept: dict[str, Any]) -> Callable[[torch.Tensor], None]:
    """A whole training step on a batch of token ids."""
    optimizer = expertmesh.AdamW(model.parameters(), lr=1e-5, max_grad_norm=1.0, **kept)
    release = None if arm == "ordinary" else expertmesh.GradientRelease(optimizer, arm)

    def step(ids: torch.Tensor) -> None:
        def forward() -> torch.Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        if release is None:
            forward().backward()
        else:
            release.backward(forward)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(model: Any, arm: str, batch: int, seq: int, repeats: int, kept: dict[str, Any]) -> dict[str, Any]:
    """The row of an arm: the median of `repeats` steps, each waited for."""
    step, on_gpu, times = step_of(model, arm, kept), DEVICE == "cuda", []
    tokens = torch.randint(3, model.config.vocab_size, (WARM_UP + repeats, batch, seq), device=DEVICE)
    for number, ids in enumerate(tokens):
        if on_gpu:
            torch.cuda.synchronize()
            if number == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        step(ids)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    ms = statistics.median(times[WARM_UP:])
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    return {"step_ms": round(ms, 2), "tokens_per_second": round(batch * seq / ms * 1e3), "peak_gib": peak}


def main() -> None:
    options = parser(__doc__, repeats=10)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options.add_argument("--seq", type=int, default=4096)
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument(
        "--recompute", nargs="?", const=True, default=False, type=policy_of, help="light, experts, ..."
    )
    options.add_argument("--states", choices=("8bit", "24bit", "float32"))
    options.add_argument("--offload", action="store_true", help="states of large weights in memory of the host")
    options = options.parse_args()
    seq = 64 if options.tiny else options.seq
    kept = {"states": options.states, "offload": options.offload}
    result = Result(options, layers=options.layers, seq=seq, recompute=options.recompute, **kept)
    for batch in options.batch:
        for arm in options.arms:
            torch.manual_seed(0)
            config = config_of(WORKS["qwen3-30b-a3b"], options.layers, options.tiny)
            with torch.device(DEVICE):
                model = expertmesh.AutoModelForCausalLM.from_config(config, dtype=DTYPE).train()
            recompute(model, options.recompute)
            result.add({"arm": arm, "batch": batch} | measure(model, arm, batch, seq, options.repeats, kept))
            del model
            gc.collect()


if __name__ == "__main__":
    main()
