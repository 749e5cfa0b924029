"""Every layout computes the loss and the gradients that stock Transformers computes on one process."""

import pytest
import torch

from tests.distributed import work
from tests.distributed.ranks import on_ranks
from tests.distributed.work import Case
from tests.models import load_stock, saved

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "mixtral"]
TOLERANCE = 1e-5


def check(tmp_path, family: str, num_ranks: int, cases: list[Case]) -> None:
    for case in cases:
        dp_size = num_ranks // case.setup.get("tp_size", 1)
        torch.save(work.reference(load_stock(family), dp_size, case.force), tmp_path / f"{dp_size}-{case.force}.pt")
    results = on_ranks(num_ranks, work.parity, saved(family), cases, tmp_path)
    for rank in results:
        for name, loss, grad, parameter in rank:
            assert loss <= TOLERANCE and grad <= TOLERANCE, f"{family} {name}: loss {loss:.1e}, {parameter} {grad:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(tmp_path, family):
    check(tmp_path, family, 2, [Case({"ep_size": 2}), Case({"ep_size": 2}, recompute=True), Case({})])


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(tmp_path, family):
    check(
        tmp_path,
        family,
        4,
        [
            Case({"ep_size": 4}, recompute=True),
            Case({"ep_size": 2}),
            Case({"tp_size": 2, "ep_size": 2}),
            Case({"tp_size": 2, "ep_size": 4}, recompute=True),
            Case({"dp_replicate_size": 2, "ep_size": 2}),
        ],
    )
