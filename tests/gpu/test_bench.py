"""The bench on a GPU, at tiny size: what the CPU cannot measure."""

import pytest
import torch

from expertmesh.bench.run import BenchOptions, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_memory_launches_and_host_syncs_are_measured_and_ours_never_waits(tmp_path):
    said = []
    options = BenchOptions(
        tiny=True,
        arms=("stock", "expertmesh"),
        batches=(4,),
        seq=256,
        routings=("random-init", "skewed", "balanced"),
        full=True,
        profile=True,
        repeats=2,
        out=str(tmp_path / "r.json"),
    )
    result = run(options, say=said.append)
    assert not result["failed"], said
    for row in result["rows"]:
        assert row["peak_gib"] is not None and row["launches"] > 100 and row["optimizer_ms"] > 0
        assert row["host_syncs"] == 0 or row["arm"] == "stock", said
    profiles = result["profiles"]["qwen3-30b-a3b, random-init"]
    for arm, profile in profiles.items():
        components = {row["component"]: row for row in profile["components"]}
        launches = sum(row["launches"] for row in components.values())
        counted = next(row["launches"] for row in result["rows"] if row["arm"] == arm)
        assert launches == pytest.approx(counted, rel=0.02)
        assert {"attention core", "attention linears", "experts up", "experts wgrads", "loss head"} <= set(components)
    assert result["parity"]["qwen3-30b-a3b"]["expertmesh"]["worst_ratio"] < 3
