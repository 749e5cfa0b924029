"""Nobody has to know about experts: stock Trainer, TRL and ours log on ranks what one process logs."""

import pytest

from tests.distributed import trainers
from tests.distributed.ranks import on_the_same_ranks
from tests.models import saved


@pytest.mark.parametrize("layout", [{"ep_size": 2}, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_losses_norms_and_metrics_of_every_step(tmp_path, layout):
    alone = {kind: trainers.records(0, kind, saved("qwen3_moe"), None, tmp_path) for kind in ("stock", "trl")}
    wanted = {"stock": "stock", "ours": "stock", "released": "stock", "trl": "trl", "our trl": "trl"}
    several = [(kind, saved("qwen3_moe"), layout, tmp_path) for kind in wanted]
    for (kind, single), ranks in zip(wanted.items(), on_the_same_ranks(2, trainers.records, several), strict=True):
        keys = [
            "loss",
            "grad_norm",
            *(["entropy", "mean_token_accuracy", "num_tokens"] if kind in trainers.SFT else []),
        ]
        for got in ranks:
            assert len(got) == len(alone[single]) == trainers.STEPS
            for mine, other in zip(got, alone[single], strict=True):
                same = pytest.approx({key: other[key] for key in keys}, rel=1e-4)
                assert {key: mine[key] for key in keys} == same, kind


def test_muon_steps_experts_and_what_it_gathers_as_in_one_process(tmp_path):
    alone, by_adamw = (trainers.records(0, kind, saved("qwen3_moe"), None, tmp_path) for kind in ("muon", "ours"))
    assert alone[-1]["loss"] != pytest.approx(by_adamw[-1]["loss"], rel=3e-3)
    several = [("muon", saved("qwen3_moe"), layout, tmp_path) for layout in ({"ep_size": 2}, {})]
    for ranks in on_the_same_ranks(2, trainers.records, several):
        for got in ranks:
            for key in ("loss", "grad_norm"):
                assert [mine[key] for mine in got] == pytest.approx([other[key] for other in alone], rel=1e-3), key
