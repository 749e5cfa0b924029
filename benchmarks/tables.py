"""Write the tables of README.md and docs/ from the files in benchmarks/results, and the three plots.

    python benchmarks/tables.py        # needs expertmesh, and matplotlib for the plots

A page marks the position and the content of a table:

    <!-- table: steps h200_qwen3_30b -->
    <!-- end of table -->

The first word is one of `TABLES`, the others are its arguments, mostly a file of benchmarks/results. The line below
each table has hardware, versions, commit and command. Figures in the text around a table are not generated: check them
after a new result.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plans import beside_measured
from simulate import beside_published

from expertmesh.bench.arms import LIBRARIES
from expertmesh.bench.pictures import bars
from expertmesh.train.plots import picture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- table: ([^>]*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
WITHOUT = "expertmesh-no-"


def filled(text: str) -> str:
    """Return the text of a page with its tables regenerated."""

    def block(found: re.Match) -> str:
        kind, *words = found[2].split()
        return f"{found[1]}\n{TABLES[kind](*words)}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: Iterable[list]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def source(result: dict) -> str:
    """Return the line below a table, with the provenance of its result."""
    note = f" {result['note']}" if "note" in result else ""
    packages = "torch", "triton", "transformers", "trl", "peft", *LIBRARIES
    versions = ", ".join(f"{name} {result[name]}" for name in packages if result.get(name))
    machine = f"{result['gpus']} x {result['hardware']}" if result["gpus"] else result["hardware"]
    commit = f"commit `{(result['commit'] or 'unknown')[:10]}`"
    if "landed_as" in result:
        commit += f", landed as `{result['landed_as'][:10]}`"
    return f"{machine}; {versions}; {commit}; `{result['command']}`.{note}"


# Loops


def places(result: dict) -> dict[tuple, dict[str, dict]]:
    """Return the rows of each (work, layers, loop, batch, seq), by arm."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        place = tuple(row[key] for key in ("work", "layers", "loop", "batch", "seq"))
        found.setdefault(place, {})[row["arm"]] = row
    return found


def best_stock(arms: dict[str, dict]) -> dict | None:
    stocks = (row for name, row in arms.items() if name.startswith("stock"))
    return min(stocks, key=lambda row: row["step_ms"], default=None)


def loops(name: str) -> str:
    """Return a table of stock, its best arm and ours. A cell is empty if its arm was not run."""
    result, cells = load(name), []
    for (work, _, loop, batch, seq), arms in places(result).items():
        best = best_stock(arms)
        stock, ours, trained = (arms.get(arm) for arm in ("stock", "expertmesh", "expertmesh-trainer"))
        ms = {
            row["arm"]: "out of memory" if row["error"].startswith("OutOfMemoryError") else "failed"
            for row in result["failed"]
            if (row["work"], row["what"]) == (work, f"{loop}, {batch} x {seq}")
        }
        ms |= {arm: row["step_ms"] for arm, row in arms.items()}  # fmt: skip

        def times(row: dict | None, mine: tuple = (ours, trained)) -> str:
            return " / ".join(f"{row['step_ms'] / own['step_ms']:.2f}x" for own in mine if row and own)

        named = "" if best is None else f"{best['step_ms']} ({best['arm'].removeprefix('stock-')})"
        memory = ["" if row is None else row["peak_gib"] for row in (stock, best, ours or trained)]
        own = [ms.get(arm, "") for arm in ("expertmesh", "expertmesh-trainer")]
        cells.append([loop, f"{batch} x {seq}", ms.get("stock", ""), named, *own, times(stock), times(best), *memory])
    header = ["loop", "rows", "stock ms", "best stock arm ms", "ours ms", "our trainer ms", "against stock"]
    header += ["against best", "peak GiB: stock", "best", "ours"]
    return f"{table(header, cells)}\n\n{source(result)}"


def arms_of_loops(name: str) -> str:
    """Return a table of all arms, with the range of their step times and their losses."""
    result = load(name)
    cells = [
        [row["work"], row["loop"], f"{row['batch']} x {row['seq']}", row["arm"], row["step_ms"]]
        + [f"{min(row['steps_ms'])} to {max(row['steps_ms'])}", f"{row['tokens_per_second']:,}", row["peak_gib"]]
        + [row.get("reserved_gib", ""), " ".join(f"{loss:.3f}" for loss in row["losses"])]
        for row in result["rows"]
    ]
    header = ["model", "loop", "rows", "arm", "step ms", "of all steps", "tokens/s", "peak GiB", "reserved", "losses"]
    return f"{table(header, cells)}\n\n{source(result)}"


# Whole models

#: header of a column -> key of the rows; columns without values in a result are omitted
COLUMNS = {
    "forward ms": "forward_ms", "backward ms": "backward_ms", "clip ms": "clip_ms", "AdamW ms": "optimizer_ms",
    "step ms": "step_ms", "tokens/s": "tokens_per_second_per_gpu", "against stock": "against_stock",
    "peak GiB": "peak_gib", "TFLOP/s": "tflops_per_gpu", "% of GEMM": "percent_of_gemm", "host syncs": "host_syncs",
    "launches": "launches",
}  # fmt: skip


def steps(name: str, *without: str) -> str:
    """Return tables of forward and backward, or of whole steps, one per work and routing. without: arms to omit.

    Arms without one fusion have their own table (`worth`).
    """
    result, groups = load(name), {}
    for row in result["rows"]:
        if not row["arm"].startswith(WITHOUT) and row["arm"] not in without and "failed" not in row:
            groups.setdefault((row["work"], row["layers"], row["routing"]), []).append(row)
    tables = [f"{work}, {layers} layers, {routing} routing:\n\n{step_table(rows)}"
              for (work, layers, routing), rows in groups.items()]  # fmt: skip
    return "\n\n".join([*tables, source(result)])


def step_table(rows: list[dict]) -> str:
    stock = {row["batch"]: row["step_ms"] for row in rows if row["arm"] == "stock"}
    for row in rows:
        times = stock[row["batch"]] / row["step_ms"] if row["batch"] in stock else None
        row["against_stock"] = None if times is None else f"{times:.2f}x"
    columns = {title: key for title, key in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    cells = [
        [row["arm"], f"{row['batch']} x {row['seq']}", *(_cell(row.get(key)) for key in columns.values())]
        for row in sorted(rows, key=lambda row: row["batch"])
    ]
    return table(["arm", "batch", *columns], cells)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def worth(*names: str) -> str:
    """Return a table of step times without each fusion, relative to all fusions. The last result of a work counts."""
    results, last = [load(name) for name in names], {}
    for result in results:
        last |= {row["work"]: result for row in result["rows"]}
    rows = [row for result in results for row in result["rows"] if last[row["work"]] is result]
    whole = {(row["work"], row["batch"]): row["step_ms"] for row in rows if row["arm"] == "expertmesh"}
    found: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        if row["arm"].startswith(WITHOUT):
            place = row["work"], row["batch"]
            found.setdefault(row["arm"].removeprefix(WITHOUT), {})[place] = f"{row['step_ms'] / whole[place]:.3f}"
    cells = [[f"`{name}`", *(times.get(place, "") for place in whole)] for name, times in found.items()]
    header = ["without", *(f"{work}, {batch} x {rows[0]['seq']}" for work, batch in whole)]
    return "\n\n".join([table(header, cells), *map(source, results)])


def proof(*names: str) -> str:
    """Return a table of the errors of loss and gradients in bfloat16, against stock in float32."""
    results = [load(name) for name in names]
    cells = [
        [work, f"{found['stock']['loss_error']:.1e}", f"{found['expertmesh']['loss_error']:.1e}"]
        + [f"{found['expertmesh']['worst_ratio']:.2f}x", f"`{found['expertmesh']['worst_tensor']}`"]
        for result in results
        for work, found in result["parity"].items()
    ]
    header = ["model", "loss error: stock", "ours", "largest gradient error of ours against stock's", "in"]
    return "\n\n".join([table(header, cells), *map(source, results)])


def components(name: str, arm: str) -> str:
    """Return a table of the milliseconds and floor of each component, for one step of one arm."""
    result = load(name)
    (profile,) = (arms[arm] for arms in result["profiles"].values())
    rows = [
        [row["component"], row["ms"], row["floor_ms"] or "", _times(row["ms"], row["floor_ms"])]
        + [row["launches"], row["floor"]]
        for row in profile["components"]
    ]
    ms, floor = (sum(row[key] for row in profile["components"]) for key in ("ms", "floor_ms"))
    launches = sum(row["launches"] for row in profile["components"])
    rows.append(["**all**", f"{ms:.3f}", f"{floor:.3f}", _times(ms, floor), launches, ""])
    header = ["component", "ms", "floor ms", "times the floor", "launches", "floor is"]
    rates = result["ceilings"]
    return f"""{table(header, rows)}

Steps queued one behind the other took {profile["forward_and_backward_ms"]} ms; the profiled step ran alone, on a GPU
that had been idle and clocks higher. Floors: {rates["gemm_tflops"]:.0f} TFLOP/s, {rates["copy_tb_per_s"]:.2f} TB/s.

{source(result)}"""


def _times(ms: float, floor: float) -> str:
    return f"{ms / floor:.2f}" if floor else ""


# Parts of a step


def named_rows(result: dict, key: str) -> list[dict]:
    """Return the rows at this key of a result. If they are named, the names become a column."""
    found = result[key]
    return [{key[:-1]: f"`{name}`"} | row for name, row in found.items()] if isinstance(found, dict) else found


def rows(names: str, *columns: str) -> str:
    """Return a table of all rows with times and all their columns, or of the rows with the last of `columns`.

    names: a file, several files joined by "+", or FILE:KEY for rows (or named rows) at another key.
    """
    names, _, key = names.partition(":")
    results = [load(name) for name in names.split("+")]
    found = [row | row.get("trace", {}) for result in results for row in named_rows(result, key or "rows")]
    timed = [row for row in found if any(key.endswith(("ms", "_s", "us")) or key == "failed" for key in row)]
    keys = columns or list(dict.fromkeys(key for row in timed for key in row))
    cells = [
        [row.get(key, "") for key in keys] for row in (found if columns else timed) if keys[-1] in row or not columns
    ]
    return "\n\n".join([table([key.replace("_", " ") for key in keys], cells), *map(source, results)])


def cases(name: str) -> str:
    """Return a table of forward and backward of each case of `shared.time_cases`, or of their sum if only that was
    timed, with a column for each implementation.
    """
    result = load(name)
    timed = [row for row in result["rows"] if "failed" not in row]
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in timed:
        cells.setdefault((row["kernel"], row["pass"]), {"floor": row["floor_ms"]})[row["implementation"]] = row["ms"]
    arms = list(dict.fromkeys(row["implementation"] for row in timed))
    found = [
        [kernel, what, ms["floor"], *(ms.get(arm, "") for arm in arms)]
        for (kernel, what), ms in cells.items()
        if what != "both" or (kernel, "forward") not in cells
    ]
    return f"{table(['kernel', 'pass', 'floor ms', *arms], found)}\n\n{source(result)}"


def plans() -> str:
    """Return the table of plans.py, the rows with the largest difference first."""
    said, header, cells = beside_measured()
    return f"{said}\n\n{table(header, cells)}"


def simulated(name: str) -> str:
    """Return the table of simulate.py."""
    result = load(name)
    return f"{table(*beside_published(result['rows']))}\n\n{source(result)}"


TABLES: dict[str, Callable[..., str]] = {
    made.__name__: made
    for made in (loops, arms_of_loops, steps, worth, proof, components, rows, cases, plans, simulated)
}


def pictures(folder: Path) -> None:
    """Write the plots of the front page (whole steps), the profile (one step by component) and the quality page."""
    names = {"trainer": "Trainer", "sft-packed": "SFTTrainer, packed", "trainer-padded": "Trainer, padded"}
    result, times = load("h200_loops"), {}
    for (_, _, loop, batch, _), arms in places(result).items():
        if batch == 4:
            found = {"stock Transformers": arms["stock"], "its best arm": best_stock(arms)}
            found |= {"import line changed": arms["expertmesh"], "our trainer as well": arms["expertmesh-trainer"]}
            times |= {f"{names[loop]}: {arm}": {arm: row["step_ms"]} for arm, row in found.items()}
    title = f"{result['rows'][0]['work']} widths, {result['rows'][0]['layers']} layers, one H200"
    bars(times, title, "ms per training step of 4 rows of up to 4,096 tokens, by wall clock", folder / "loops.png")
    result = load("h200_profile")
    (profiles,) = result["profiles"].values()
    parts = {arm: {row["component"]: row["ms"] for row in found["components"]} for arm, found in profiles.items()}
    bars(parts, "One step by component", "ms of device time", folder / "profile.png")
    curves(load("h200_quality"), folder / "quality.png")


def curves(result: dict, path: Path) -> None:
    """Plot held-out losses during training, as means over the seeds, one line per arm."""
    with picture(path, 7.2, 4.0) as (_, (axes,)):
        for arm in (found["arm"] for found in result["arms"]):
            seeds = [row["curve"] for row in result["rows"] if row["arm"] == arm]
            losses = [statistics.mean(point["held_out"] for point in points) for points in zip(*seeds, strict=True)]
            axes.plot([point["step"] for point in seeds[0]], losses, linewidth=1.2, marker=".", label=arm)
        axes.set(xlabel="steps", ylabel="held-out loss", title="AdamW's states, and gradients released (running)")
        axes.legend()


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    pictures(ROOT / "docs" / "images")
