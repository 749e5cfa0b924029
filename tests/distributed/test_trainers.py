"""Nobody has to know about experts: stock Trainer, TRL and ours log on ranks what one process logs."""

import pytest

from tests.distributed import trainers
from tests.distributed.ranks import on_ranks
from tests.models import saved


@pytest.mark.parametrize("kind", ["stock", "ours", "released", "trl", "our trl"])
@pytest.mark.parametrize("layout", [{"ep_size": 2}, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_losses_norms_and_metrics_of_every_step(tmp_path, kind, layout):
    single = {"ours": "stock", "released": "stock", "our trl": "trl"}.get(kind, kind)
    want = trainers.records(0, single, saved("qwen3_moe"), None, tmp_path)
    keys = ["loss", "grad_norm", *(["entropy", "mean_token_accuracy", "num_tokens"] if kind in trainers.SFT else [])]
    for got in on_ranks(2, trainers.records, kind, saved("qwen3_moe"), layout, tmp_path):
        assert len(got) == len(want) == trainers.STEPS
        for mine, other in zip(got, want, strict=True):
            assert {key: mine[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-4)
