"""The two pictures can be drawn from whatever a run has measured."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from expertmesh.train.plots import loss_curve, router_heatmap  # noqa: E402


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "eval_loss": 3.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "train_runtime": 1.0}],
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "loss": 1.0}],
    ],
)
def test_a_loss_curve(tmp_path, records):
    loss_curve(records, tmp_path / "plots" / "loss.png")
    assert is_png(tmp_path / "plots" / "loss.png")


@pytest.mark.parametrize("shape", [(1, 2), (4, 8), (48, 128)])
@pytest.mark.parametrize("windows", [1, 2])
def test_a_router_heatmap(tmp_path, shape, windows):
    counts_LE = np.arange(np.prod(shape)).reshape(shape)
    counts_LE[0] = 0
    router_heatmap([("steps", counts_LE)] * windows, tmp_path / "router.png")
    assert is_png(tmp_path / "router.png")
