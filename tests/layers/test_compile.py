"""Layers compiled one by one, as users do with large models: the same numbers, few breaks, one graph for any length."""

import pytest
import torch

from expertmesh import AutoModelForCausalLM
from expertmesh.backends import interpreted
from expertmesh.bench.rows import worst_error
from expertmesh.bench.tiny import tiny_config
from expertmesh.layers.base_model import as_stock
from tests.models import load_ours, load_stock


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, ids, called=None, **inputs):
    model.zero_grad()
    loss = (model if called is None else called)(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt_oss", "granitemoe"))]
)
def test_compiled_layers_equal_eager_and_compile_once_for_all_lengths(family):
    eager, compiled = load_ours(family).train(), load_ours(family).train()
    for layer in compiled.model.layers[-1:]:
        layer.compile(backend="aot_eager")
    for length, recompiles in ((24, True), (40, True), (56, False)):  # the second length makes the length a variable
        ids = torch.randint(0, eager.config.vocab_size, (2, length))
        want = loss_and_gradients(eager, ids)
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            got = loss_and_gradients(compiled, ids)
        error, where = worst_error(got, want)
        assert error < 1e-5, (length, where)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_compiled_layer_is_one_graph_and_the_moe_block_behind_it(family):
    model = load_ours(family).train()
    inputs = []
    layer = model.model.layers[-1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    ids = torch.arange(24)[None]
    model(input_ids=ids)
    layer._forward_pre_hooks.clear()
    (args, kwargs), *_ = inputs
    explained = torch._dynamo.explain(layer)(*args, **kwargs)
    reasons = [str(reason.reason) for reason in explained.break_reasons]
    assert explained.graph_count == 1 and len(reasons) == 1 and "FastMoEBlock.forward" in reasons[0], reasons


IDS = torch.arange(24).view(2, 12)


def gradients_by_torch_func(model):
    def loss(parameters):
        return torch.func.functional_call(model, parameters, kwargs={"input_ids": IDS, "labels": IDS}).loss

    return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


def exported(model, strict=False):
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    return {"logits": torch.export.export(model, (), inputs, strict=strict).module()(**inputs).logits}


@pytest.mark.parametrize("way", [gradients_by_torch_func, exported])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_transforms_or_exports_a_model_gets_transformers_code(family, way):
    stock, ours = load_stock(family).train(), load_ours(family).train()
    before = loss_and_gradients(ours, IDS)
    error, where = worst_error(way(ours), way(stock))
    assert error < 1e-5, where
    error, where = worst_error(loss_and_gradients(ours, IDS), before)
    assert error == 0 and type(ours.model.layers[0]).__fast__, where


def test_a_strict_export_is_a_single_graph():
    got = exported(load_ours("qwen3_moe").train(), strict=True)["logits"]
    assert torch.allclose(got, load_stock("qwen3_moe").train()(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_whole_model_is_one_graph_without_kernels(family):
    """With padding; within `interpreted` a kernel would run on the CPU."""
    stock, ours = load_stock(family).train(), load_ours(family).train()
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    want = loss_and_gradients(stock, IDS, attention_mask=mask)
    with interpreted():
        got = loss_and_gradients(ours, IDS, torch.compile(ours, fullgraph=True, backend="eager"), attention_mask=mask)
    error, where = worst_error(got, want)
    assert error < 1e-5 and got.keys() == want.keys(), where


def test_one_graph_without_the_loss_that_was_asked_for_is_refused():
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, mtp_loss_weight=0.3).train()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True or mtp_loss_weight out"):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize(("asked", "within"), [("expertmesh", "grouped_mm"), ("batched_mm", "batched_mm")])
def test_experts_that_were_asked_for_run_there_as_well(asked, within):
    model = load_ours("qwen3_moe")
    model.set_experts_implementation(asked)
    with as_stock(model.model):
        assert model.config._experts_implementation == within and model.config._attn_implementation == "sdpa"
    assert model.config._experts_implementation == asked and model.config._attn_implementation == "expertmesh"
