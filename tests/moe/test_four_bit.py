"""Adapters on experts in 4 bits train as on the weights that the codes stand for, and nobody keeps what was decoded."""

import contextlib
import copy

import pytest
import torch

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig, fuse
from expertmesh.bench.tiny import randomise, tiny_config
from expertmesh.kernels.packed import Packed
from expertmesh.moe.experts import experts_forward
from expertmesh.weights.four_bit import pack
from tests.kernels.compare import on_triton
from tests.moe.test_lora import TARGETS, adapt, batch

TOLERANCE = 1e-5
#: tiny models whose rows are whole blocks, one or two
WIDTHS = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 128},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 128},
    "deepseek_v3": {"hidden_size": 64, "moe_intermediate_size": 64},
    "nemotron_h": {"hidden_size": 64, "moe_intermediate_size": 64, "moe_latent_size": 128},
}
CASES = [
    ("qwen3_moe", "nf4"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "nf4"),
    ("deepseek_v3", "mxfp4"),
    ("nemotron_h", "nf4"),
]


def config(family, **changes):
    return tiny_config(family, **WIDTHS[family] | changes)


def pair(family="qwen3_moe", format="nf4", targets=None):
    """(a model in 4 bits, the model of the weights that it stands for), with adapters."""
    torch.manual_seed(0)
    held = randomise(AutoModelForCausalLM.from_config(config(family), dtype=torch.float32))
    pack(held, ExpertsQuantConfig(format))
    whole = copy.deepcopy(held)
    for experts, name, weight in packed_weights(whole):
        experts._parameters[name] = torch.nn.Parameter(weight.decode().clone(), requires_grad=False)
    options = {"target_modules": "all-linear"} if targets is None else {}
    return [adapt(model, family, **options) for model in (held, whole)]


def packed_weights(model):
    found = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if isinstance(p, Packed)]
    assert len(found) >= 2
    return found


def step(model, **inputs):
    """(loss, gradients) of a step; no buffer may be among what autograd saved."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model.train().zero_grad()
        loss = model(**inputs).loss
    buffers = {made.data_ptr() for made in getattr(model, "experts_buffer", NO_BUFFER)._buffers.values()}
    assert not buffers & {x.data_ptr() for x in saved if not isinstance(x, Packed)}
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class NO_BUFFER:
    _buffers: dict = {}


def assert_same(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert got[1].keys() == expected[1].keys() and len(got[1]) >= 4
    for name, grad in expected[1].items():
        assert grad.any() and (got[1][name] - grad).abs().max() <= TOLERANCE * grad.abs().max(), name


@pytest.mark.parametrize(("family", "format"), CASES)
def test_loss_and_gradients_are_those_of_the_decoded_model(family, format):
    held, whole = pair(family, format, TARGETS)
    assert_same(step(held, **batch(held)), step(whole, **batch(whole)))
    shapes = [[(name, p.shape, p.dtype) for name, p in model.named_parameters()] for model in (held, whole)]
    assert shapes[0] == shapes[1]
    (buffer,) = held.experts_buffer._buffers.values()
    assert len(buffer) == max(weight.numel() for *_, weight in packed_weights(held))


def test_packed_rows_recomputed_layers_all_linear_and_a_copy():
    models = pair()
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = step(models[1], **batch(models[1], packed=True))
    assert any("experts" in name for name in expected[1]) and any("attn" in name for name in expected[1])
    assert_same(step(models[0], **batch(models[0], packed=True)), expected)
    copied = copy.deepcopy(models[0])
    assert copied.experts_buffer is not models[0].experts_buffer
    assert {id(weight.buffer) for *_, weight in packed_weights(copied)} == {id(copied.experts_buffer)}
    assert_same(step(copied, **batch(copied, packed=True)), expected)


def test_adapters_off_after_inference():
    held, whole = pair()
    inputs = batch(held)
    losses = []
    for model in (held, whole):
        with torch.inference_mode(), model.disable_adapter():
            losses.append(model(**inputs).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert_same(step(held, **inputs), step(whole, **inputs))


def test_the_kernels_take_what_the_decode_kernel_leaves():
    torch.manual_seed(0)
    changes = {"num_experts": 2, "moe_intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(config("qwen3_moe", **changes), dtype=torch.float32)
    pack(model, ExpertsQuantConfig("mxfp4"))
    experts, x, ids = packed_weights(model)[0][0], torch.randn(3, 64), torch.tensor([[0, 1], [1, 0], [1, 0]])
    outputs = []
    for on in (contextlib.nullcontext, on_triton):
        leaf, weight = x.clone().requires_grad_(), torch.full((3, 2), 0.5, requires_grad=True)
        with on():
            out = experts_forward(experts, leaf, ids, weight)
            out.square().sum().backward()
        outputs.append((out.detach(), leaf.grad, weight.grad))
    for expected, got in zip(*outputs, strict=True):
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_packed_weight_is_moved_cast_and_pickled_and_refuses_the_rest(tmp_path):
    held, _ = pair()
    for device in ("cpu", torch.bfloat16, torch.float32):
        held.to(device)
        assert isinstance(device, str) or packed_weights(held)[0][2].dtype == device
    weight = packed_weights(held)[0][2]
    torch.save(weight, tmp_path / "weight")
    again = torch.load(tmp_path / "weight", weights_only=False)
    for other in (again, weight.to("meta"), weight.bfloat16(), weight.transpose(1, 2).transpose(1, 2)):
        assert isinstance(other, Packed) and other.shape == weight.shape and other.stride() == weight.stride()
    assert torch.equal(again.decode().clone(), weight.decode().clone())
    assert torch.equal(weight.transpose(1, 2).decode(), weight.decode().clone().transpose(1, 2))
    assert weight.bfloat16().decode().dtype == torch.bfloat16 and "nf4" in repr(weight)
    for wrong in (lambda: weight + 1, lambda: held.merge_and_unload(), lambda: weight[0]):
        with pytest.raises(ValueError, match="Experts' weights are kept in 4 bits and do not support aten"):
            wrong()
    with pytest.raises(ValueError, match="frozen and cannot be trained: train adapters"):
        held.base_model.model.requires_grad_(True)


def test_a_model_whose_experts_run_elsewhere_is_refused():
    model = fuse(AutoModelForCausalLM.from_config(config("qwen3_moe")), {"experts": False})
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="only where this library computes them"):
        pack(model, ExpertsQuantConfig())
    with pytest.raises(ValueError, match="There is no format 'int4'.*mxfp4.*nf4"):
        ExpertsQuantConfig("int4")
