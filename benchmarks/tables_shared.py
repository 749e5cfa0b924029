"""What all tables of results share: reading a result file, a Markdown table, the line that says where it comes from."""

import json
from pathlib import Path

from expertmesh.bench.arms import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WITHOUT = "expertmesh-no-"


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results_with(key: str) -> list[dict]:
    """The results whose rows have this key, by name of file."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if any(key in row for row in result["rows"])]


def table(header: list[str], rows: list[list]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def source(result: dict) -> str:
    note = f" {result['note']}" if "note" in result else ""
    packages = "torch", "triton", "transformers", "trl", "peft", *LIBRARIES
    versions = ", ".join(f"{name} {result[name]}" for name in packages if result.get(name))
    machine = f"{result['gpus']} x {result['hardware']}" if result["gpus"] else result["hardware"]
    commit = f"commit `{(result['commit'] or 'unknown')[:10]}`"
    if "landed_as" in result:
        commit += f", landed as `{result['landed_as'][:10]}`"
    return f"{machine}; {versions}; {commit}; `{result['command']}`.{note}"


# what `expertmesh bench` measures besides; results from before it lack these
MORE = {
    "clip ms": "clip_ms",
    "optimizer ms": "optimizer_ms",
    "TFLOP/s": "tflops_per_gpu",
    "% of GEMM": "percent_of_gemm",
    "host syncs": "host_syncs",
    "launches": "launches",
}


def step_table(result: dict) -> str:
    """One table per work and routing; arms without one fusion have their own (`worth_table`)."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        if not row["arm"].startswith(WITHOUT):
            groups.setdefault((row["work"], row["layers"], row["routing"]), []).append(row)
    tables = []
    for (work, layers, routing), rows in groups.items():
        title = f"{work}, {layers} layers, {routing} routing:\n\n" if len(groups) > 1 else ""
        tables.append(title + _step_table(rows))
    return "\n\n".join(tables)


def _step_table(rows: list[dict]) -> str:
    stock = {row["batch"]: row["tokens_per_second_per_gpu"] for row in rows if row["arm"] == "stock"}
    more = {} if "host_syncs" not in rows[0] else {n: key for n, key in MORE.items() if rows[0][key] is not None}
    cells = [
        [
            row["arm"],
            f"{row['batch']} x {row['seq']}",
            row.get("forward_ms", ""),
            row.get("backward_ms", ""),
            f"{row['tokens_per_second_per_gpu']:,}",
            f"{row['tokens_per_second_per_gpu'] / stock[row['batch']]:.2f}x" if row["batch"] in stock else "",
            row.get("peak_gib", ""),
            *(row[key] for key in more.values()),
        ]
        for row in sorted(rows, key=lambda row: row["batch"])
    ]
    return table(["arm", "batch", "forward ms", "backward ms", "tokens/s", "against stock", "peak GiB", *more], cells)


def times_table(result: dict) -> str:
    """Every row that has times, with all its columns."""
    rows = [row for row in result["rows"] if any(key.endswith(("ms", "_s")) or key == "failed" for key in row)]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in keys], [[row.get(key, "") for key in keys] for row in rows])
