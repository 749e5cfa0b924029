"""Layers compiled one by one, as users do with large models: the same numbers, few breaks, one graph for any length."""

import pytest
import torch

from expertmesh.bench.rows import worst_error
from tests.models import load_ours


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_compiled_layers_equal_eager_and_compile_once_for_all_lengths(family):
    eager, compiled = load_ours(family).train(), load_ours(family).train()
    for layer in compiled.model.layers:
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
