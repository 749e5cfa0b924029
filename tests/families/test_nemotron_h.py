"""Nemotron 3's block of experts in a latent width: the product that projects back adds the residual."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from expertmesh.bench.parity import CPU_TOLERANCE, Case, compare_case
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import tiny_model
from expertmesh.fuse import fuse
from expertmesh.layers.decoder import FastNemotronHMoEBlock
from tests.models import load_ours, load_stock


@pytest.fixture
def products(monkeypatch) -> list[float]:
    """The scale of each product that added into what was already there."""
    scales: list[float] = []
    function = torch.Tensor.addmm_

    def recorded(self, *args, **options):
        if "alpha" in options:  # the head's products add, too
            scales.append(options["alpha"])
        return function(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", recorded)
    return scales


def block_of(model) -> nn.Module:
    block = model.model.layers[1].mixer
    assert block.config.moe_latent_size is not None
    return block


def loss_of(model) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_all_gradients_equal_stock(bias, products):
    kinds = ["moe", "linear_attention", "full_attention", "moe"]
    stock = tiny_model("nemotron_h", layers_block_type=kinds, mlp_bias=bias)
    ours = fuse(copy.deepcopy(stock))
    assert isinstance(ours.model.layers[0].mixer, FastNemotronHMoEBlock)
    cases = [Case("plain"), Case("packed", "packed"), Case("recomputed", "packed", checkpointing=True)]
    for case in [*cases, Case("experts without tokens", routing="starved")]:
        assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert bool(products) is not bias


def test_a_scaled_residual_is_added_in_the_product_and_stays_as_it_was(products):
    block = block_of(load_ours("nemotron_h"))
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32, requires_grad=True)
    before, expected = residual.detach().clone(), residual + 0.5 * block(x)
    got = block(x, residual, 0.5)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert products == [0.5] and torch.equal(residual, before) and torch.equal(residual.grad, torch.ones_like(x))


def test_a_residual_of_another_dtype_is_added_afterwards(products):
    block = block_of(load_ours("nemotron_h"))
    x, residual = torch.randn(1, 5, 32), torch.randn(1, 5, 32, dtype=torch.float64)
    got = block(x, residual)
    torch.testing.assert_close(got, residual + block(x))
    assert got.dtype == torch.float64 and not products


def test_a_projection_that_somebody_watches_is_called(products):
    stock, ours = load_stock("nemotron_h").train(), load_ours("nemotron_h").train()
    block_of(ours).fc2_latent_proj.register_forward_hook(lambda *call: 2 * call[2])
    block_of(stock).fc2_latent_proj.register_forward_hook(lambda *call: 2 * call[2])
    assert relative_error(loss_of(ours).detach(), loss_of(stock).detach()) <= CPU_TOLERANCE
    assert len(products) == 1  # of the other block


@pytest.mark.parametrize("target", ["fc1_latent_proj", "fc2_latent_proj"])
def test_adapters_on_the_latent_projections_train_as_on_stock(target):
    found = []
    for load in (load_stock, load_ours):
        model = load("nemotron_h").train()
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(target_modules=[target], init_lora_weights=False), model.model.layers)
        loss = loss_of(model)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if "lora" in name}
        found.append(gradients | {"loss": loss.detach()})
    assert len(found[0]) == 5 and all(g.abs().max() > 0 for g in found[1].values())
    assert worst_error(found[1], found[0])[0] <= CPU_TOLERANCE
