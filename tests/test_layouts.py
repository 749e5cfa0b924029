"""`expertmesh check --ranks`: the layouts of several ranks are compared, and a wrong gradient under one is seen."""

import pytest
import torch

from expertmesh.bench import layouts
from expertmesh.bench.layouts import check_layouts
from expertmesh.cli import run
from tests.models import saved


def test_layouts_of_two_ranks_equal_stock_on_one_process():
    rows = check_layouts(saved("qwen3_moe"), 2)
    assert {row.case for row in rows} == {
        "fsdp 2, ep 1", "fsdp 2, ep 1, recomputed", "fsdp 2, ep 2", "fsdp 2, ep 2, recomputed",
    }  # fmt: skip
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_a_wrong_reference_is_noticed(monkeypatch):
    stock = layouts._on_one_process

    def wrong(model, num_ranks):
        want = stock(model, num_ranks)
        want["gradients"]["model.layers.1.mlp.gate.weight"] *= 1.001
        return want

    monkeypatch.setattr(layouts, "_on_one_process", wrong)
    bad = [row for row in check_layouts(saved("mixtral"), 2) if not row.ok]
    assert bad and all(row.quantity == "gradients" and "layers.1.mlp.gate" in row.where for row in bad)


@pytest.mark.slow
def test_the_command_compares_on_four_ranks(capsys):
    assert run(["check", "deepseek_v3", "--ranks", "4"]) == 0
    assert "fsdp 4, ep 4, recomputed" in capsys.readouterr().out


def test_ranks_are_compared_on_the_cpu_only(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run(["check", "qwen3_moe", "--ranks", "2", "--device", "cuda"]) == 2
    assert "float32 on the CPU" in capsys.readouterr().err
