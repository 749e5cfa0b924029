"""Plots of a benchmark: step time by phase and by component for each arm, and tokens/s over tokens per step."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertmesh.bench.steps import PHASES
from expertmesh.train.plots import picture

COLOURS = (
    *("#2f6f9f", "#7fb2d6", "#e9c46a", "#d1495b", "#2a9d8f", "#8d6a9f", "#f4a261", "#9fc5a8", "#6c757d"),
    *("#c1a57b", "#264653", "#e5989b", "#b5b682", "#4d908e", "#adb5bd", "#7f5539", "#577590", "#d4a5a5"),
)


def draw(result: dict[str, Any], out: str | Path) -> list[Path]:
    """Plot a result into the folder of its file, for each work and routing: OUT-WORK-ROUTING-times.png, -tokens.png if
    several batch sizes ran, and -components.png if there are profiles. Return the paths.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["work"], row["routing"]), []).append(row)
    stem, drawn = Path(out).with_suffix(""), []
    for (work, routing), rows in groups.items():
        title = f"{work}, {rows[0]['layers']} layers, {routing} routing"

        def path(kind: str, of: str = f"{work}-{routing}") -> Path:
            drawn.append(stem.with_name(f"{stem.name}-{of}-{kind}.png"))
            return drawn[-1]

        largest = max(row["batch"] for row in rows)
        last = [row for row in rows if row["batch"] == largest]
        times = {row["arm"]: {phase: row[f"{phase}_ms"] for phase in PHASES if row[f"{phase}_ms"]} for row in last}
        bars(times, title, f"ms per step of {largest} x {rows[0]['seq']} tokens", path("times"))
        if len({row["batch"] for row in rows}) > 1:
            tokens(rows, title, path("tokens"))
        profiles = result["profiles"].get(f"{work}, {routing}")
        if profiles:
            times = {
                arm: {row["component"]: row["ms"] for row in found["components"]} for arm, found in profiles.items()
            }
            bars(times, title, "ms of device time per step, by component", path("components"))
    return drawn


def bars(times: dict[str, dict[str, float]], title: str, axis: str, path: Path) -> None:
    """Plot one stacked bar per arm from `times` (arm -> part -> ms)."""
    parts = list(dict.fromkeys(part for of_arm in times.values() for part in of_arm))
    with picture(path, 8.0, 1.5 + 0.4 * len(times) + 0.25 * (len(parts) / 3)) as (page, (axes,)):
        left = [0.0] * len(times)
        for part, colour in zip(parts, itertools.cycle(COLOURS), strict=False):
            widths = [of_arm.get(part, 0.0) for of_arm in times.values()]
            axes.barh(range(len(times)), widths, left=left, color=colour, label=part, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, end in enumerate(left):
            axes.annotate(f" {end:.4g}", (end, place), va="center")
        axes.set_yticks(range(len(times)), list(times))
        axes.invert_yaxis()
        axes.set(title=title, xlabel=axis, xlim=(0, max(left) * 1.1))
        page.legend(ncols=4 if len(parts) < 5 else 3, loc="outside lower center")


def tokens(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Plot tokens per second over the tokens of a step, one line per arm."""
    with picture(path, 7.2, 4.0) as (_, (axes,)):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            points = sorted(
                (row["batch"] * row["seq"], row["tokens_per_second_per_gpu"]) for row in rows if row["arm"] == arm
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
        axes.set(title=title, xlabel="tokens per GPU and step", ylabel="tokens/s per GPU")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend()
