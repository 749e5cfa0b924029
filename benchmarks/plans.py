"""Compare the predictions of `expertmesh plan` with every committed row of ours that a plan describes.

    python benchmarks/plans.py     # any machine, a minute or two; then python benchmarks/tables.py

Rows of one GPU without a loop are a forward and backward; rows of loops are whole steps of our trainer. For steps that
the CPU slowed down (eager ones on several GPUs, transformers' own Trainer) only memory is compared.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from expertmesh.bench import loops
from expertmesh.bench.works import WORKS, config_of
from expertmesh.plan.gpus import GPUS
from expertmesh.plan.memory import GIB, Job, memory_of, trace
from expertmesh.plan.speed import speed_of

RESULTS = Path(__file__).resolve().parent / "results"
OUT = Path(__file__).resolve().parent / "plans.json"
GPU = GPUS["h200"]
#: (work, layers, batch, ranks, whole steps) to which plan/speed.py's constants were fitted; memory has no constants
FITTED = {
    ("qwen3-30b-a3b", 8, 1, 1, False),
    ("qwen3-30b-a3b", 8, 4, 1, False),
    ("deepseek-v3", 2, 1, 1, False),
    ("nemotron-3-nano", 13, 1, 1, False),
    ("qwen3-30b-a3b", 8, 1, 1, True),
    ("qwen3-30b-a3b", 48, 1, 2, False),
    ("qwen3-30b-a3b with adapters", 8, 4, 1, True),
}
#: results from before a rank kept only its share of the rows that its experts might get
OLDER = {"h200_x4_qwen3_30b_step", "h200_x4_nemotron_3_nano_step", "h200_x2_nemotron_3_nano"}
#: models that have no work of their own -> the work with their code, and other widths
MODELS: dict[str, tuple[str, dict[str, int]]] = {"gpt-oss-120b": ("gpt-oss-20b", {"num_local_experts": 128})}


class Case(NamedTuple):
    """The configuration and time of a row. job: the arguments of `Job`, as JSON. full: whole steps. ms None: the time
    is not compared.
    """

    work: str
    layers: int
    job: str
    full: bool
    ms: float | None


def case_of(name: str, result: dict[str, Any], row: dict[str, Any]) -> Case | None:
    """Return the case of a row, or None if a plan does not describe it: other code than ours, or rows with padding."""
    arm, loop, ranks = row.get("arm", ""), row.get("loop"), result["gpus"]
    if not arm.startswith("expertmesh") or "-no-" in arm or "-push" in arm or name in OLDER or "step_ms" not in row:
        return None
    if loop in ("trainer-padded", "lora", "dpo"):
        return None
    job = {"batch": row["batch"], "seq": row["seq"], "world_size": ranks, "released": "-released" in arm}
    job["documents"] = 2 if loop == "sft-packed" else 1  # attention of documents of equal length
    if "format" in row:
        experts = None if row["format"] == "bf16" else row["format"]
        job |= {"recompute": row["recompute"], "adapters": True, "experts": experts}
        ms = row["step_ms"] if arm == "expertmesh-trainer" else None
        return Case(row["model"], row["layers"], json.dumps(job), True, ms)
    spread = ranks > 1 and (loop is not None or "-ep" in arm or "-gather" in arm)
    eager = (ranks > 1 and "-graph" not in arm and arm != "expertmesh-trainer") or (loop and arm == "expertmesh")
    job["optimizer"] = "adamw-8bit" if "-8bit" in arm else "adamw" if loop or row.get("optimizer_ms") else "sgd"
    job |= {"ep_size": ranks if spread else 1, "recompute": "experts" if "-experts" in arm else "-recompute" in arm}
    job |= {"adapters": loop == "lora-experts", "experts": "nf4" if arm == "expertmesh-4bit" else None}
    ms = None if eager else row.get("forward_backward_ms", row["step_ms"])
    return Case(row["work"], row["layers"], json.dumps(job), loop is not None, ms)


def cases() -> Iterator[tuple[str, dict[str, Any], Case]]:
    """Yield (file, row, case) of every committed row that a plan describes."""
    for path in sorted(RESULTS.glob("h200*.json")):
        result = json.loads(path.read_text())
        for row in result.get("rows", []):
            if row.get("peak_gib") is None:
                continue
            if "states" in result:  # of train_run.py
                row = {"work": "qwen3-30b-a3b", "layers": result["layers"], "seq": result["seq"]} | row
                job = {"batch": row["batch"], "seq": row["seq"], "recompute": result["recompute"]}
                job |= {"optimizer": f"adamw-{result['states']}" if result["states"] else "adamw"}
                job |= {"released": row["arm"] != "ordinary" and row["arm"], "offloaded": result.get("offload", False)}
                case = Case(row["work"], row["layers"], json.dumps(job), True, row["step_ms"])
            else:
                case = case_of(path.stem, result, row)
            if case is not None:
                yield path.stem, row, case


@cache
def planned(work: str, layers: int, job: str, full: bool) -> tuple[float, float]:
    """Return the (GiB, ms) that a plan predicts for a case."""
    work, widths = MODELS.get(work, (work, {}))
    options = {"optimizer": "adamw"} | json.loads(job)
    adapt = loops.adapted if options.pop("adapters", False) else None
    asked = Job(config_of(WORKS[work], layers, **widths), adapt=adapt, **options)
    found = trace(asked, GPU.memory)
    return memory_of(asked, found).peak / GIB, speed_of(asked, found, GPU, steps=full).step * 1e3


def compared(name: str, row: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return a row with its planned values."""
    job, (gib, ms) = json.loads(case.job), planned(*case[:-1])
    ranks = job.get("world_size", 1)
    place = case.work + " with adapters" * job.get("adapters", False), case.layers, job["batch"], ranks, case.full
    row = row | {"work": case.work, "arm": " ".join(filter(None, [row["arm"], row.get("format")]))}
    return {
        "file": name,
        **{key: row.get(key) for key in ("work", "loop", "arm", "layers", "batch", "seq")},
        "gpus": ranks,
        "peak_gib": row["peak_gib"],
        "planned_gib": round(gib, 2),
        "ms": case.ms,
        "planned_ms": None if case.ms is None else round(ms, 1),
        "fitted": job.get("documents", 1) == 1 and place in FITTED,
    }


def beside_measured() -> tuple[str, list[str], list[list[Any]]]:
    """Return a summary of the committed predictions, and the header and rows of their table."""
    found = json.loads(OUT.read_text())

    def off(row: dict[str, Any], planned: str, measured: str) -> float:
        return row[planned] / row[measured] - 1 if row[measured] else 0.0

    errors = [(off(row, "planned_gib", "peak_gib"), off(row, "planned_ms", "ms")) for row in found]
    shapes = {tuple(row[key] for key in ("work", "loop", "arm", "layers", "batch", "seq", "gpus")) for row in found}
    close = sum(abs(memory) <= 0.05 for memory, _ in errors)
    times = [abs(time) for row, (_, time) in zip(found, errors, strict=True) if row["ms"] and not row["fitted"]]
    said = f"{len(found)} rows of {len(shapes)} configurations. Memory: {close} of {len(found)} rows within 5 %. Time: "
    said += f"{sum(time <= 0.15 for time in times)} of {len(times)} rows that no constant was fitted to within 15 %."
    header = "file, work, arm, layers, tokens, GPUs, GiB, planned, off, ms, planned, off, constants".split(", ")
    cells = [
        [row["file"].removeprefix("h200_"), row["work"], ", ".join(filter(None, [row["arm"], row["loop"]]))]
        + [row["layers"], f"{row['batch']} x {row['seq']}", row["gpus"], row["peak_gib"], row["planned_gib"]]
        + [
            f"{100 * memory:+.1f} %",
            *([row["ms"], row["planned_ms"], f"{100 * time:+.1f} %"] if row["ms"] else [""] * 3),
        ]
        + ["fitted" if row["fitted"] else ""]
        for row, (memory, time) in sorted(zip(found, errors, strict=True), key=lambda pair: -max(map(abs, pair[1])))
    ]
    return said, header, cells


if __name__ == "__main__":
    OUT.write_text(json.dumps([compared(*found) for found in cases()], indent=1) + "\n")
