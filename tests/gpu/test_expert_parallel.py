"""Expert parallelism over NCCL with the Triton kernels: the gradients of one GPU, and who waits for whom."""

import pytest
import torch

from tests.distributed import work
from tests.distributed.ranks import on_ranks
from tests.distributed.work import Case
from tests.models import load_stock, saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FOUR = pytest.param(4, marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral"])
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_gpus_compute_the_gradients_of_one(tmp_path, ranks, family):
    layout, few = {"ep_size": ranks}, (0, 1, 2) if family in ("deepseek_v3", "nemotron_h") else (0, 1)
    gather = layout | {"dispatch": "gather"}
    cases = [Case(layout), Case(layout, recompute=True), Case(layout, force=few), Case({})]
    cases += [Case(gather), Case(gather, recompute=True), Case(gather, force=few)]
    if ranks == 4:  # two groups of two, each expert sharded over both
        cases += [Case(near | {"ep_size": 2}) for near in (layout, gather)]
    for force in (None, few):
        torch.save(work.reference(load_stock(family).cuda(), ranks, force), tmp_path / f"{ranks}-{force}.pt")
    for rank in on_ranks(ranks, work.parity, saved(family), cases, tmp_path, gpus=True):
        for name, loss, grad, parameter in rank:
            assert loss <= 1e-4 and grad <= 1e-3, f"{family} {name}: loss {loss:.1e}, {parameter} {grad:.1e}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dispatch", "waits"), [("all_to_all", 2), ("gather", 0)])
def test_only_the_wait_for_the_counts_stops_the_host(dispatch, waits, recompute):
    case = Case({"ep_size": 2, "dispatch": dispatch}, recompute=recompute)
    for waited in on_ranks(2, work.host_waits, saved("qwen3_moe"), case, gpus=True):
        assert waited == {"forward": waits, "backward": 0}


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_mailboxes_and_collectives_bring_the_same_rows(ranks):
    assert on_ranks(ranks, work.mailboxes, 200, gpus=True) == [200] * ranks
