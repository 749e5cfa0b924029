"""The demo: a real run, and it fails when what it promises does not hold."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertmesh.cli import demo as demo_module
from expertmesh.cli import run
from expertmesh.cli.demo import compare_with_stock, settings
from expertmesh.data import demo_config, demo_tokenizer


def test_the_demo_trains_saves_draws_and_proves_the_export(tmp_path, capsys):
    assert run(["demo", "--steps", "60", "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    before, after = map(float, re.search(r"held-out loss\s+([\d.]+) → ([\d.]+)", said).groups())
    assert after < 0.8 * before
    assert "every tensor bit-equal" in said and said.count("before:") == len(demo_module.QUESTIONS)
    for file in (
        "final/model.safetensors",
        "final/tokenizer.json",
        "plots/loss.png",
        "plots/router.png",
        "metrics.jsonl",
    ):
        assert (tmp_path / file).stat().st_size > 0
    assert (tmp_path / "plots/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_does_not_fall_is_a_failure(tmp_path, monkeypatch, capsys):
    changes = {"train": {"max_steps": 1}, "data": {"name": "demo:chat", "max_length": 64}, "log": {}}
    monkeypatch.setattr(demo_module, "settings", lambda *asked: settings(*asked) | changes)
    assert run(["demo", "--steps", "20", "--output-dir", str(tmp_path)]) == 1
    assert re.search(r"held-out loss.* no", capsys.readouterr().out)


@pytest.fixture
def saved(tmp_path):
    """A stock model and the folder of its checkpoint."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(demo_config()).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_an_equal_checkpoint_is_found_equal(saved):
    assert compare_with_stock(saved[0], demo_tokenizer(), saved[1]) == ([], 0.0)


def test_a_checkpoint_that_differs_in_one_weight_is_found_out(saved):
    model, folder = saved
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[3, 0, 0] += 1e-3
    differing, _ = compare_with_stock(model, demo_tokenizer(), folder)
    assert differing == [name]


def test_a_model_that_computes_something_else_is_found_out(saved):
    model, folder = saved
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 1.001)
    differing, error = compare_with_stock(model, demo_tokenizer(), folder)
    assert not differing and error > 1e-4
