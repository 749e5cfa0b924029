"""Plot a run's loss curve and its router load. Needs matplotlib (the `plots` extra)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def loss_curve(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Plot training and held-out loss over the optimizer steps. records: from `read_metrics`."""
    with picture(path, 7.2, 4.0) as (_, (axes,)):
        for key, name, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=f"{name}, at last {points[-1][1]:.2f}")
                axes.legend()
        axes.set(title="Loss", xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(axis="y")


def router_heatmap(windows: Sequence[tuple[str, np.ndarray]], path: str | Path) -> None:
    """Plot the load of every expert, one panel per (title, counts [layers, experts]).

    The colour is an expert's share of its layer's tokens times the number of experts: 1 is even, 0 a dead expert.
    """
    layers, experts = windows[0][1].shape
    width, height = np.clip(experts * 0.32, 3.2, 9.0) * len(windows) + 1.4, np.clip(layers * 0.32, 1.6, 9.0) + 1.2
    with picture(path, width, height, len(windows)) as (page, panels):
        for axes, (title, counts_LE) in zip(panels, windows, strict=True):
            load_LE = counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1) * experts
            image = axes.imshow(load_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
            axes.set(title=title, xlabel="expert")
            axes.locator_params(integer=True)
        panels[0].set_ylabel("MoE layer")
        page.colorbar(image, ax=panels, extend="max", label="load (1 = even share)")


@contextmanager
def picture(path: str | Path, width: float, height: float, panels: int = 1) -> Iterator[tuple[Any, Any]]:
    """Context manager that yields (figure, axes of the panels) and saves to `path` on exit. Sizes are in inches."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    style: dict[Any, Any] = dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False)
    style |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "lines.linewidth": 2, "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        page = Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield page, page.subplots(1, panels, sharey=True, squeeze=False)[0]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        page.savefig(path)
