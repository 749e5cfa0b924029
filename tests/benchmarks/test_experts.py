"""The kernels of a library beside ours in benchmarks/experts.py: same products, and errors are entries."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _segments(bounds):
    return [slice(a, b) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def _gemm(a, b, out, c, semaphore, *tile, pingpong, persistent, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None):
    """quack.gemm.gemm: out = a · bᵀ, row groups of a and out, or column groups of a and b."""
    assert c is None and semaphore is None and len(tile) == 4
    if cu_seqlens_k is not None:
        assert a.stride(0) == b.stride(0) == 1
        for expert, rows in enumerate(_segments(cu_seqlens_k)):
            out[expert] = a[:, A_idx[rows].long()] @ b[:, rows].t()
    else:
        for expert, rows in enumerate(_segments(cu_seqlens_m)):
            out[rows] = a[rows] @ b[expert].t()


def _gemm_act(a, b, *, activation, concat_layout, tuned, config, cu_seqlens_m, A_idx):
    """quack.gemm_interface.gemm_act: weights in halves, h with gate and up in turns."""
    assert activation == "swiglu" and concat_layout == ("B",) and not tuned and b.stride(1) == 1
    if config.tile_m == 256:
        raise ValueError("no such tile\nand more about it")
    h = torch.cat([a[A_idx[rows].long()] @ b[e] for e, rows in enumerate(_segments(cu_seqlens_m))])
    gate, up = h.chunk(2, dim=1)
    postact = F.silu(gate) * up * (1.1 if config.tile_n == 256 else 1)
    return torch.stack((gate, up), 2).flatten(1), postact


def _gemm_dact(
    a, b, pre, *, activation, colvec_scale, colvec_reduce, dynamic_scheduler, tuned, config, cu_seqlens_m, A_idx
):
    """quack.gemm_interface.gemm_dact: (dh in turns, scaled a, its product with the unscaled gradient)."""
    assert activation == "swiglu" and colvec_reduce and not dynamic_scheduler and not tuned
    da = torch.cat([a[A_idx[rows].long()] @ b[e] for e, rows in enumerate(_segments(cu_seqlens_m))])
    pre = pre.clone().requires_grad_()
    with torch.enable_grad():
        post = F.silu(pre[:, ::2]) * pre[:, 1::2]
        (dpre,) = torch.autograd.grad(post, pre, da * colvec_scale[:, None])
    return dpre, post.detach() * colvec_scale[:, None], (post.detach() * da).sum(1)


@pytest.fixture
def script(monkeypatch):
    """benchmarks/experts.py on the CPU, with a quack that follows quack-kernels 0.6.5's signatures."""
    modules = {
        "quack": {},
        "quack.gemm": {"gemm": _gemm},
        "quack.gemm_interface": {"gemm_act": _gemm_act, "gemm_dact": _gemm_dact},
        "quack.gemm_config": {"GemmConfig": types.SimpleNamespace},
    }
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
    monkeypatch.setattr(experts, "median_ms", lambda run, repeats: run() is None or 2.0)
    yield experts
    for name in ("experts", "experts_quack"):
        sys.modules.pop(name, None)


def test_a_library_computes_what_ours_does_and_what_it_refuses_is_an_entry(script):
    module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=4, hidden_size=16, moe_intermediate_size=8))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    result, saved = {"kernels": {}}, []
    script.alone(result, script.operands(module, tokens=24), 1, lambda: saved.append(len(result["kernels"])))
    quack = result["libraries"]["quack"]
    assert list(quack) == list(result["kernels"]) == list(script.kernels(script.operands(module, 24)))
    assert saved == [n for n in range(1, 7) for _ in range(2)]
    for name, entry in quack.items():
        assert entry["ms"] > 0 and entry["config"] == "128x192 pingpong, cluster 2x1", (name, entry)
        assert all("ms" in tried for tried in entry["tried"]) or name == "up_act", (name, entry)
    right, wrong, refused = quack["up_act"]["tried"]
    assert "ms" in right and wrong["failed"].startswith("differs from ours by 0.0e+00, 1.0e-01")
    assert refused == {"failed": "ValueError: no such tile", "config": "256x128, cluster 2x1"}
