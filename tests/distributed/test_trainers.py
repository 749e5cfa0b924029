"""Nobody has to know about experts: stock Trainer, TRL and ours log on ranks what one process logs."""

import pytest

from tests.distributed import trainers
from tests.distributed.ranks import on_ranks
from tests.models import saved


@pytest.mark.parametrize("kind", ["stock", "ours", "trl"])
@pytest.mark.parametrize("layout", [{"ep_size": 2}, {}], ids=str)
def test_losses_and_norms_of_every_step(tmp_path, kind, layout):
    want = trainers.losses(0, kind if kind != "ours" else "stock", saved("qwen3_moe"), None, tmp_path)
    for got in on_ranks(2, trainers.losses, kind, saved("qwen3_moe"), layout, tmp_path):
        assert len(got) == len(want) == trainers.STEPS
        for (loss, norm), (want_loss, want_norm) in zip(got, want, strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-4) and norm == pytest.approx(want_norm, rel=1e-4)
