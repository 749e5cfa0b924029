"""Two pictures of a run: how the loss fell, and where the tokens went. Needs matplotlib (the `plots` extra)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, FAINT, TRAIN, HELD_OUT = "#1f2933", "#cbd2d9", "#2f6f9f", "#d1495b"


def loss_curve(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws training and held-out loss over the optimizer steps from the records of a metrics.jsonl."""
    page, axes = figure(7.2, 4.0)
    train = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    held_out = [(record["step"], record["eval_loss"]) for record in records if record.get("eval_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, linewidth=2, marker="o", markersize=5, label="held out")
        axes.annotate(
            f"{held_out[-1][1]:.2f}", held_out[-1], (0, 8), textcoords="offset points", ha="right", color=HELD_OUT
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title("Loss", loc="left", fontweight="bold", color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    if train or held_out:
        axes.legend(frameon=False)
    save(page, path)


def router_heatmap(windows: Sequence[tuple[str, np.ndarray]], path: str | Path) -> None:
    """Draws the load of every expert, one panel per (title, counts [layers, experts]).

    Colour is an expert's share of its layer's rows times the number of experts: 1 is an even share, 0 a dead expert.
    """
    loads = [
        (title, counts / np.maximum(counts.sum(1, keepdims=True), 1) * counts.shape[1]) for title, counts in windows
    ]
    layers, experts = loads[0][1].shape
    width = float(np.clip(experts * 0.32, 3.2, 9.0))
    page, panels = figure(width * len(loads) + 1.4, float(np.clip(layers * 0.32, 1.6, 9.0)) + 1.2, len(loads))
    for axes, (title, load_LE) in zip(np.atleast_1d(panels), loads, strict=True):
        image = axes.imshow(load_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        axes.set_title(title, loc="left", fontweight="bold", color=INK)
        axes.set_xlabel("expert")
        for axis, size in ((axes.xaxis, experts), (axes.yaxis, layers)):
            axis.set_ticks(range(0, size, max(1, size // 16)))
        axes.spines[:].set_visible(False)
    np.atleast_1d(panels)[0].set_ylabel("MoE layer")
    bar = page.colorbar(image, ax=list(np.atleast_1d(panels)), extend="max", shrink=0.9, pad=0.02)
    bar.set_label("load (1 = even share)")
    bar.outline.set_visible(False)
    save(page, path)


def figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of this size in inches with its axes (an array, if there are several panels), in our style."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    page = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = page.subplots(1, panels, sharey=True)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=INK, length=3)
    return page, axes


def save(page: Any, path: str | Path) -> None:
    """Writes the figure, and the folder if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path)
