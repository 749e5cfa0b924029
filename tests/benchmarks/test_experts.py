"""The kernels of a library beside ours in benchmarks/experts.py: same products, and errors are entries."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tests.kernels import fake_quack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _gemm_act(a, b, *, config, **options):
    if config.tile_m == 64:
        raise ValueError("no such tile\nand more about it")
    h, postact = fake_quack.gemm_act(a, b, config=config, **options)
    return h, postact * 1.1


@pytest.fixture
def script(monkeypatch):
    """benchmarks/experts.py on the CPU, with a quack that follows quack-kernels 0.6.5's signatures."""
    modules = fake_quack.MODULES | {"quack.gemm_interface": {"gemm_act": _gemm_act, "gemm_dact": fake_quack.gemm_dact}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("experts", "experts_quack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    experts = importlib.import_module("experts")
    torch.manual_seed(0)
    weights, ids = torch.randn(24, 4).softmax(-1).topk(2)
    monkeypatch.setattr(experts, "routing", lambda tokens, kind: (weights, ids))
    yield experts
    for name in ("experts", "experts_quack"):
        sys.modules.pop(name, None)


def test_a_library_computes_what_ours_does_and_what_it_refuses_is_an_entry(script):
    module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=4, hidden_size=16, moe_intermediate_size=8))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    result, saved = {"kernels": {}}, []
    operands = script.operands(module, tokens=24)
    script.alone(result, operands, lambda run: run() is None or 2.0, lambda: saved.append(len(result["kernels"])))
    quack = result["libraries"]["quack"]
    assert list(quack) == list(result["kernels"]) == list(script.kernels(script.operands(module, 24)))
    assert saved == [n for n in range(1, 7) for _ in range(2)]
    for name, entry in [item for item in quack.items() if item[0] != "up_act"]:
        assert entry["ms"] > 0 and "cluster" in entry["config"], (name, entry)
        assert all("ms" in tried for tried in entry["tried"]), (name, entry)
    wrong, refused = quack["up_act"]["tried"]
    assert "ms" not in quack["up_act"] and wrong["failed"].startswith("differs from ours by 0.0e+00, 1.0e-01")
    assert refused == {"failed": "ValueError: no such tile", "config": "64x256 pingpong, cluster 2x1"}
