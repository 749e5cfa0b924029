"""A block that adds the residual inside its experts equals one that adds it afterwards, whoever looks on."""

import contextlib

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from expertmesh import backends, fuse
from expertmesh.layers.decoder import add_block
from expertmesh.moe import exchange, experts
from expertmesh.moe.block import FastMoEBlock, FastSharedMoEBlock
from tests.models import load_ours, load_stock


def layer_of(fused: bool, implementation: str = "expertmesh"):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=16, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, experts_implementation="grouped_mm",
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    if fused:
        model = fuse(model)
        model.set_experts_implementation(implementation)
    return model.model.layers[0]


def run(layer):
    torch.manual_seed(1)
    x, angle = torch.randn(2, 7, 24, requires_grad=True), torch.randn(1, 7, 12)
    layer.zero_grad()
    out = layer(x, position_embeddings=(angle.cos(), angle.sin()))
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def counting(monkeypatch) -> list[bool]:
    """Collects, for each sum of the experts' rows, whether a residual was added there."""
    seen: list[bool] = []

    def combine(y_SH, position_TK, weight_TK=None, residual=None):
        seen.append(residual is not None)
        return stock(y_SH, position_TK, weight_TK, residual)

    stock = experts.combine
    for module in (exchange, experts):
        monkeypatch.setattr(module, "combine", combine)
    return seen


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize(
    ("watched", "implementation", "seen"),
    [
        (None, "expertmesh", [True, False]),
        ("mlp", "expertmesh", [False, False]),
        ("mlp.experts", "expertmesh", [False, False]),
        (None, "grouped_mm", []),
    ],
)
def test_the_layer_equals_stock_whoever_watches(watched, implementation, seen, path, monkeypatch):
    expected = run(layer_of(fused=False))
    layer, found = layer_of(fused=True, implementation=implementation), counting(monkeypatch)
    assert isinstance(layer.mlp, FastMoEBlock)
    outputs = []
    if watched is not None:
        layer.get_submodule(watched).register_forward_hook(lambda *call: outputs.append(call[2]))
    with backends.interpreted() if path == "triton" else contextlib.nullcontext():
        got = run(layer)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert ((got[name] - value).abs().max() / scale) < 1e-5, name
    assert found == seen and len(outputs) == (watched is not None)


def test_a_residual_of_another_dtype_is_added_afterwards():
    block = layer_of(fused=True).mlp
    x, residual = torch.randn(1, 5, 24), torch.randn(1, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x, residual), residual + block(x))
    assert block(x, residual).dtype == torch.float64


def test_a_module_around_the_experts_is_called_without_a_residual():
    class Around(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, hidden_states, ids, weights):
            return 2 * self.base(hidden_states, ids, weights)

    block = layer_of(fused=True).mlp
    x, residual = torch.randn(1, 5, 24), torch.randn(1, 5, 24)
    expected = residual + 2 * block(x)
    block.experts = Around(block.experts)
    torch.testing.assert_close(block(x, residual), expected)


def test_shared_experts_are_added_in_the_same_sum(monkeypatch):
    layer, found = load_ours("deepseek_v3").model.layers[1], counting(monkeypatch)
    assert isinstance(layer.mlp, FastSharedMoEBlock)
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(layer.mlp(x, residual), residual + layer.mlp(x))
    assert found == [True, False]


@pytest.mark.parametrize("padded", [False, True])
def test_noise_on_the_inputs_of_a_block_is_drawn_as_in_stock(padded):
    losses = []
    for load in (load_stock, load_ours):
        model = load("mixtral", router_jitter_noise=0.4).train()
        ids = torch.arange(3, 19).view(2, 8)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 1 - padded
        labels = torch.where(mask == 1, ids, -100)
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(model(input_ids=ids, attention_mask=mask, labels=labels).loss.item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-3


def test_a_block_that_returns_its_routing_weights_too_adds_a_residual_all_the_same(monkeypatch):
    block, found = load_ours("gpt_oss").model.layers[1].mlp, counting(monkeypatch)
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    expected = residual + block(x)[0]
    torch.testing.assert_close(block(x, residual), expected)
    block.experts.register_forward_hook(lambda *call: None)
    torch.testing.assert_close(block(x, residual), expected)
    torch.testing.assert_close(add_block(block, x, residual), expected)
    block.register_forward_hook(lambda *call: None)
    torch.testing.assert_close(add_block(block, x, residual), expected)
    assert found == [False, True, False, False, False]
