"""Simulate models of hundreds of billions of parameters on hundreds of GPUs, on this machine.

    python benchmarks/simulate.py --out benchmarks/results/simulated_h100.json     # any machine, two minutes

Nothing is measured: the bytes of a rank are those of real shards, and everything else is predicted by a plan. Only the
config.json of each model is needed (models/), taken from the published configurations. Each row also has the figures
that NVIDIA published for NeMo AutoModel on the same number of H100.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import Result, parser
from transformers import AutoConfig

from expertmesh.bench.tiny import tiny_config
from expertmesh.plan.gpus import GIB, GPUS
from expertmesh.plan.memory import Job
from expertmesh.plan.simulate import Simulation, simulate

MODELS = Path(__file__).resolve().parent / "models"
GPU = GPUS["h100-80gb"]
SHARED = {"seq": 4096, "ep_size": 64, "recompute": True, "mtp": True}
JOBS: list[tuple[str, dict[str, Any]]] = [
    ("nemotron-3-ultra-550b", {"world_size": 128, "batch": 2}),
    ("nemotron-3-ultra-550b", {"world_size": 128, "batch": 2, "optimizer": "adamw-8bit", "released": True}),
    ("deepseek-v3", {"world_size": 256, "batch": 2}),
]
HELD = ("parameters", "gradients", "optimizer states")
SHOWN = ("ep_size", "batch", "seq", "optimizer", "released", "recompute", "per_node")
#: NeMo AutoModel's report of June 2026 (GiB, tokens/s per GPU); DeepSeek V3 ran with 4 pipeline stages, without GiB
PUBLISHED = {"nemotron-3-ultra-550b": (58.2, 815), "deepseek-v3": (None, 1002)}


def row_of(model: str, found: Simulation) -> dict[str, Any]:
    """Return a row of the result."""
    layout = found.plan.layout
    job, memory, speed = layout.job, layout.memory, layout.speed
    least = speed.step - found.seconds_hidden
    row = {"model": model, "parameters": found.parameters, "ranks": job.world_size}
    return row | {
        **{name: getattr(job, name) for name in SHOWN},
        "network_gb_per_s": GPU.network / 1e9,
        "held_bytes": found.held,
        "pieces_gib": {name: round(size / GIB, 2) for name, size in memory.pieces.items()},
        "peak_gib": round(memory.peak / GIB, 1),
        "needed_gib": round(memory.needed / GIB, 1),
        "sent_gb": {name: [round(size / 1e9, 1) for size in sent] for name, sent in found.sent.items()},
        "seconds": {name: round(seconds, 3) for name, seconds in speed.seconds.items()},
        "step_s": [round(least, 2), round(speed.step, 2)],
        "tokens_per_second_per_gpu": [round(speed.tokens_per_second), round(speed.tokens / least)],
        "published": PUBLISHED[model],
    }


def beside_published(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return the header and rows of a table with simulated and published values of each model."""

    def sent(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: " + ".join(f"{size:,}" for size in row["sent_gb"][name])

    lines: dict[str, Callable[[dict[str, Any]], Any]] = {
        "parameters": lambda row: f"{row['parameters'] / 1e9:.1f}B",
        "GPUs, `ep_size`": lambda row: f"{row['ranks']}, {row['ep_size']}",
        "optimizer": lambda row: row["optimizer"] + ", gradients released" * row["released"],
        "tokens of a GPU in a step": lambda row: f"{row['batch']} x {row['seq']}",
        **{f"{name} of a GPU, GiB": lambda row, name=name: f"{row['held_bytes'][name] / GIB:.1f}" for name in HELD},
        "weights that FSDP gathered, at the peak, GiB": lambda row: row["pieces_gib"]["gathered weights"],
        "allocated at the peak, GiB": lambda row: row["peak_gib"],
        "published for NeMo AutoModel, GiB": lambda row: row["published"][0] or "",
        "needed, with fragmentation and CUDA, GiB": lambda row: row["needed_gib"],
        "weights and gradients sent, NVLink + network, GB": sent("weights and gradients"),
        "tokens of experts sent, NVLink + network, GB": sent("tokens of experts"),
        "step, s": lambda row: "{:,} to {:,}".format(*row["step_s"]),
        "tokens/s of a GPU": lambda row: "{:,} to {:,}".format(*row["tokens_per_second_per_gpu"]),
        "published for NeMo AutoModel, tokens/s": lambda row: f"{row['published'][1]:,}",
    }
    return ["", *(row["model"] for row in rows)], [[name, *map(line, rows)] for name, line in lines.items()]


def main() -> None:
    options = parser(__doc__).parse_args()
    result = Result(options, hardware="simulated", gpus=0, gpu=GPU.name)
    for model, sizes in JOBS:
        config = AutoConfig.from_pretrained(MODELS / model)
        job = Job(config, **SHARED, **sizes)
        if options.tiny:
            job = Job(tiny_config(config.model_type), seq=64, world_size=8, ep_size=4)
        result.add(row_of(model, simulate(job, GPU)))


if __name__ == "__main__":
    main()
