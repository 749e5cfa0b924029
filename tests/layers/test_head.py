"""Whatever is done with the logits of a training forward, before the loss or after it, has stock's result."""

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from expertmesh.backends import interpreted
from expertmesh.bench.rows import relative_error
from expertmesh.layers.head import DeferredGradient, DeferredLogits
from expertmesh.memory.adamw import AdamW
from tests.models import load_ours, load_stock

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 128


@pytest.fixture(scope="module")
def pair():
    """(stock, ours): with experts of one layer they are as small as it gets."""
    return load_stock("qwen3_moe").train(), load_ours("qwen3_moe").train()


@pytest.fixture(scope="module")
def granite():
    return load_stock("granitemoe").train(), load_ours("granitemoe").train()


def run(model, **inputs):
    return model(input_ids=IDS, labels=IDS, **inputs)


class Custom(torch.autograd.Function):
    """Looks at its input past PyTorch's dispatcher, as kernels do."""

    @staticmethod
    def forward(ctx, logits):
        return torch.from_numpy(logits.detach().numpy()) ** 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def custom_function(model):
    outputs = run(model)
    (outputs.loss + Custom.apply(outputs.logits).mean()).backward()


def reentrant_around_the_logits(model):
    outputs = run(model)
    (
        outputs.loss + checkpoint(lambda x: x.log_softmax(-1)[..., 0].mean(), outputs.logits, use_reentrant=True)
    ).backward()


def reentrant_around_the_model(model):
    embeds = model.get_input_embeddings()(IDS)
    logits = checkpoint(lambda x: model(inputs_embeds=x, labels=IDS).logits, embeds, use_reentrant=True)
    model.loss_function(logits, IDS, model.config.vocab_size).backward()
    return logits


def reentrant_around_the_loss(model):
    embeds = model.get_input_embeddings()(IDS)
    checkpoint(lambda x: model(inputs_embeds=x, labels=IDS).loss, embeds, use_reentrant=True).backward()


def gradient_of_logits(model):
    outputs = run(model)
    return torch.autograd.grad(outputs.loss, outputs.logits)


def gradient_kept(model):
    outputs = run(model)
    outputs.logits.retain_grad()
    (2 * outputs.loss).backward()
    return outputs.logits.grad


def hook_that_looks(model):
    outputs, seen = run(model), []
    outputs.logits.register_hook(lambda grad: seen.append(grad.abs().sum()))
    outputs.loss.backward()
    return seen


def hook_that_scales(model):
    outputs = run(model)
    outputs.logits.register_hook(lambda grad: grad * 3)
    outputs.loss.backward()


def hook_that_clips(model):
    outputs = run(model)
    outputs.logits.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    outputs.loss.backward()


def hook_that_edits(model):
    outputs = run(model)
    outputs.logits.register_hook(lambda grad: grad.mul_(5))
    outputs.loss.backward()


def gradient_of_another_call(model):
    outputs = run(model)
    (grad,) = torch.autograd.grad(outputs.loss, outputs.logits)
    model(input_ids=IDS.flip(1), labels=IDS).logits.backward(grad)


def another_loss_beside(model):
    outputs = run(model)
    (outputs.loss + outputs.logits.log_softmax(-1)[:, :, 3].mean()).backward()


def the_loss_again(model):
    logits = run(model).logits
    model.loss_function(logits, IDS, model.config.vocab_size, shift_labels=IDS).backward()


def leaf_of_logits(model):
    leaf = run(model).logits.detach().requires_grad_()
    model.loss_function(leaf, IDS, model.config.vocab_size).backward()
    return leaf.grad


def edit(model):
    logits = run(model).logits
    logits /= 0.5
    model.loss_function(logits, IDS, model.config.vocab_size).backward()
    return logits


def edit_of_a_part(model):
    logits = run(model).logits
    logits[..., 5:] = -9.0
    model.loss_function(logits, IDS, model.config.vocab_size).backward()
    return logits


def edit_of_a_detached(model):
    logits = run(model).logits
    logits.detach()[0] = 0.0
    model.loss_function(logits, IDS, model.config.vocab_size).backward()
    return logits


def copy_before_an_edit(model):
    logits = run(model).logits
    kept = [logits.clone(), logits.double(), logits * 2]
    logits.zero_()
    return kept, logits


def second_derivative(model):
    (grad,) = torch.autograd.grad(run(model).logits.logsumexp(-1).sum(), model.lm_head.weight, create_graph=True)
    grad.square().sum().backward()


def as_accelerate_returns_it(model):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = convert_outputs_to_fp32(run)(model)
    assert outputs.logits.dtype == torch.float32
    outputs.loss.backward()
    return outputs.to_tuple()[1].sum(-1)


def copies(model):
    outputs = run(model)
    detached = outputs.logits.detach()
    file = io.BytesIO()
    torch.save(detached, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(outputs.logits)
    with pytest.raises(RuntimeError, match="requires grad"):
        outputs.logits.numpy()
    return copy.deepcopy(detached), torch.load(file), pickle.loads(pickle.dumps(detached)), detached.tolist()[0][0][:3]


def under_no_grad(model):
    with torch.no_grad():
        return run(model).logits


def after_backward(model):
    outputs = run(model)
    outputs.loss.backward()
    return outputs.logits.argmax(-1)


def twice(model):
    loss = run(model).loss
    loss.backward(retain_graph=True)
    loss.backward()


def all_module_hooks(model):
    seen = []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].sum())),
        model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.sum()) or out * 2),
        model.lm_head.register_full_backward_pre_hook(lambda m, grad: seen.append(grad[0].abs().sum())),
        model.lm_head.register_full_backward_hook(lambda m, grads, grad: seen.append(grads[0].abs().sum())),
    ]
    run(model).loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    return seen


LOOKS = [look for name, look in list(globals().items()) if callable(look) and getattr(look, "__code__", None)]
LOOKS = LOOKS[LOOKS.index(custom_function) :]


@pytest.mark.parametrize(
    ("look", "family"),
    [
        *(pytest.param(look, "pair", id=look.__name__) for look in LOOKS),
        *(
            pytest.param(look, "granite", id=f"scaled, {look.__name__}")
            for look in (gradient_kept, hook_that_scales, edit)
        ),
    ],
)
def test_it_is_as_in_stock(look, family, request):
    found = []
    for model in request.getfixturevalue(family):
        model.zero_grad()
        result = look(model)
        found.append(
            (
                [] if result is None else result,
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            )
        )
    (stock, shape), (ours, same_shape) = (tree_flatten(tree) for tree in found)
    assert shape == same_shape
    for a, b in zip(ours, stock, strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        assert relative_error(a, b) <= (3e-2 if look is as_accelerate_returns_it else 2e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "nemotron_h"])  # as they are, scaled, in float32
def test_the_loss_alone_looks_at_nothing(family, monkeypatch):
    model = load_ours(family, dtype=torch.bfloat16).train()

    def look(self):
        raise AssertionError("somebody looks")

    monkeypatch.setattr(DeferredLogits, "_compute", look)
    monkeypatch.setattr(DeferredGradient, "_compute", look)
    outputs = run(model)
    outputs.logits.register_hook(lambda grad: None)
    outputs.loss.backward()
    assert isinstance(outputs.logits, DeferredLogits)


STEPS = {
    "SGD": (torch.optim.SGD, contextlib.nullcontext),
    "fused": (functools.partial(torch.optim.AdamW, fused=True), contextlib.nullcontext),
    "ours": (AdamW, interpreted),
}


@pytest.mark.parametrize("optimizer", STEPS)
def test_logits_first_looked_at_after_a_step_are_refused_and_those_kept_are_right(optimizer):
    make, path = STEPS[optimizer]
    model = load_ours("qwen3_moe").train()
    kept, late = run(model), run(model)
    before = kept.logits.detach().clone()
    (kept.loss + late.loss).backward()
    with path():
        make([model.lm_head.weight], lr=0.1).step()
    assert torch.equal(kept.logits, before)
    for look in (torch.sum, lambda logits: model.loss_function(logits, IDS, model.config.vocab_size)):
        with pytest.raises(RuntimeError, match=r"Read outputs.logits earlier"):
            look(late.logits)


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


LAYOUTS = {
    "the head by itself": lambda model, shard: (shard(model.lm_head), shard(model)),
    "as Accelerate does": lambda model, shard: shard(model, reshard_after_forward=True),
    "as Transformers does": lambda model, shard: (
        shard([model.model.norm, model.lm_head], reshard_after_forward=False),
        shard(model),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_by_fsdp_the_logits_are_as_in_stock(layout, mesh):
    found = []
    for model in (load_stock("qwen3_moe").train(), load_ours("qwen3_moe").train()):
        LAYOUTS[layout](model, functools.partial(fully_shard, mesh=mesh))
        outputs = run(model)
        (outputs.loss + outputs.logits.log_softmax(-1)[..., 3].mean()).backward()
        late = run(model)
        late.loss.backward()
        grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        found.append({"logits": outputs.logits, "loss": outputs.loss, **grads})
        if layout == "as Transformers does" and len(found) == 2:
            with pytest.raises(RuntimeError, match="FSDP has freed the head's weight"):
                late.logits.sum()
        else:
            found[-1]["late"] = late.logits
    assert isinstance(outputs.logits, DeferredLogits)
    for name, value in found[1].items():
        assert relative_error(value.detach(), found[0][name].detach()) < 2e-5, name


def test_a_head_whose_weight_comes_and_goes_makes_whole_logits_and_says_so(pair, caplog, monkeypatch):
    """As under DeepSpeed's ZeRO-3."""
    stock, ours = pair
    expected = run(stock)
    head = ours.lm_head
    whole, nothing = head.weight.data, torch.empty(0)
    hooks = [
        head.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", whole)),
        head.register_forward_hook(lambda module, args, output: setattr(module.weight, "data", nothing)),
    ]
    head.weight.data = nothing
    monkeypatch.setattr("expertmesh.backends._warned", set())
    with caplog.at_level("WARNING", "expertmesh"):
        outputs = [run(ours), run(ours)][0]
    for hook in hooks:
        hook.remove()
    head.weight.data = whole
    assert type(outputs.logits) is torch.Tensor and relative_error(outputs.loss.detach(), expected.loss.detach()) < 1e-5
    assert [record.message.count("computes all logits") for record in caplog.records] == [1]


@pytest.mark.parametrize("labels", ["int32", "none", "none, divided by 0", "outside"])
def test_odd_labels_are_as_in_stock(pair, labels):
    found = []
    for model in pair:
        model.zero_grad()
        target = IDS.int() if labels == "int32" and model is pair[1] else IDS if labels == "int32" else IDS * 0 - 100
        if labels == "outside":
            with pytest.raises((IndexError, ValueError), match=r"out of bounds|must lie in \[0, 128\)"):
                model(input_ids=IDS, labels=IDS + 1000)
            return
        loss = model(input_ids=IDS, labels=target, num_items_in_batch=0 if "divided" in labels else None).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_lora_on_the_head_learns_as_in_stock():
    found = []
    for model in (load_stock("qwen3_moe"), load_ours("qwen3_moe")):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        adapted = get_peft_model(model, config).train()
        loss = run(adapted).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.grad is not None)])
    assert len(found[1]) == 3
    for theirs, mine in zip(*found, strict=True):
        assert relative_error(mine, theirs) < 2e-5
