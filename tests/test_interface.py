"""Whatever a caller may pass to a causal LM, or do with what it returns, works on our model as on the stock one."""

import copy
import io
import math
import pickle

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import expertmesh
from expertmesh.bench.parity import CPU_TOLERANCE, make_batch
from expertmesh.bench.rows import relative_error, worst_error
from tests.models import load_ours, load_stock, shared_pair

CPU = torch.device("cpu")
ALL_KINDS = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"]


def batch(kind: str = "plain") -> dict[str, torch.Tensor]:
    return make_batch(kind, 128, CPU)


def assert_close(found, expected, path="output"):
    """Tensors within the tolerance, through tuples and model outputs; everything else equal."""
    if isinstance(expected, torch.Tensor):
        assert relative_error(found.detach(), expected.detach()) <= CPU_TOLERANCE, path
    elif isinstance(expected, dict):
        assert list(found.keys()) == list(expected.keys()), path
        for key in expected:
            assert_close(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{path}[{index}]")
    elif not isinstance(expected, transformers.Cache):
        assert found == expected, path


def train_both(family: str, loss_of, **changes):
    """Backward through `loss_of(model)` on stock and ours; asserts equal losses and gradients."""
    losses, gradients = [], []
    for model in shared_pair(family):
        model.train()
        model.zero_grad(set_to_none=True)
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach().reshape(1))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    assert relative_error(losses[1], losses[0]) <= CPU_TOLERANCE
    error, where = worst_error(gradients[1], gradients[0])
    assert error <= CPU_TOLERANCE, where


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": True},
        {"labels": True, "return_dict": False},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"labels": True, "output_hidden_states": True},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([2, 5])},
        {"use_cache": False},
        {"labels": True, "use_cache": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ALL_KINDS)
def test_forward_returns_what_stock_returns(family, options, training):
    inputs = batch()
    if not options.get("labels"):
        del inputs["labels"]
    outputs = []
    # no cache is filled in training because of the configuration alone, nor, of layers with a state, for a loss
    no_cache = (training and "labels" in inputs) or (family == "nemotron_h" and (training or "labels" in inputs))
    stock_options = {"use_cache": False} if no_cache else {}
    options = {key: value for key, value in options.items() if key != "labels"}
    for model, more in zip(shared_pair(family), (stock_options, {}), strict=True):
        model.train(training)
        with torch.set_grad_enabled(training):
            outputs.append(model(**inputs, **more | options))
    assert type(outputs[1]) is type(outputs[0])
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("family", ALL_KINDS)
def test_inputs_embeds_instead_of_input_ids(family):
    inputs = batch()
    ids = inputs.pop("input_ids")
    train_both(family, lambda model: model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).loss)


@pytest.mark.parametrize("family", ALL_KINDS)
def test_shifted_labels_are_taken_as_they_are(family):
    inputs = batch()
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    train_both(family, lambda model: model(**inputs, shift_labels=shifted).loss)


def test_training_logits_carry_gradients_when_somebody_uses_them():
    """Distillation and the like: the model's own loss plus a term of the caller's on the logits."""

    def loss_of(model):
        out = model(**batch())
        return out.loss + (F.log_softmax(out.logits.float(), -1) * 0.01).pow(2).sum() + out.logits[:, -1].mean()

    train_both("qwen3_moe", loss_of)


def test_a_bias_of_the_head_is_scaled_with_the_logits():
    losses = []
    for load in (load_stock, load_ours):
        model = load("granitemoe").train()
        assert model.config.logits_scaling != 1
        torch.manual_seed(5)
        model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, model.config.vocab_size))
        losses.append(model(**batch()).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_loss_of_the_callers_own_on_logits_without_labels():
    inputs = batch()
    labels = inputs.pop("labels")
    train_both("qwen3_moe", lambda model: F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()))


def test_logits_of_a_training_step_survive_what_metrics_do_with_them():
    stock, ours = shared_pair("qwen3_moe")
    theirs, found = stock.train()(**batch()).logits, ours.train()(**batch()).logits
    assert (found.shape, found.dtype, found.device, found.ndim) == (
        theirs.shape,
        theirs.dtype,
        theirs.device,
        theirs.ndim,
    )
    for use in (
        lambda logits: logits.argmax(-1),
        lambda logits: logits[:, -1, :],
        lambda logits: logits.detach().cpu().numpy(),
        lambda logits: logits.contiguous().view(-1, logits.size(-1)),
        lambda logits: torch.cat([logits, logits]),
        lambda logits: (logits / 2 + 1).sum(),
        lambda logits: logits.clone(),
        lambda logits: logits.to(torch.bfloat16).float(),
        lambda logits: torch.logsumexp(logits, -1),
        lambda logits: logits.tolist()[0][0][:3],
        lambda logits: torch.equal(logits, logits),
    ):
        a, b = (torch.as_tensor(use(logits)).double() for logits in (found, theirs))
        assert relative_error(a, b) <= CPU_TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_packed_documents_do_not_see_each_other(family):
    _, ours = shared_pair(family)
    packed = batch("packed")
    with torch.no_grad():
        together = ours.eval()(**packed, use_cache=False).logits[0, 6:]
        alone = ours(input_ids=packed["input_ids"][:1, 6:], use_cache=False).logits[0]
    assert_close(together, alone)


def test_a_loss_function_set_by_the_caller_is_the_one_that_runs():
    def squared(logits, labels, vocab_size, **_):
        return (logits.float() ** 2).mean()

    losses = []
    for load in (load_stock, load_ours):
        model = load("qwen3_moe").train()
        model.loss_function = squared
        losses.append(model(**batch()).loss.detach())
    assert relative_error(losses[1], losses[0]) <= CPU_TOLERANCE


def test_all_labels_masked_gives_what_stock_gives():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    losses = [model.train()(**inputs).loss for model in shared_pair("qwen3_moe")]
    assert all(math.isnan(loss.item()) for loss in losses)
    train_both("qwen3_moe", lambda model: model(**inputs, num_items_in_batch=torch.tensor(9)).loss)


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
@pytest.mark.parametrize("aux", [False, True])
def test_none_of_none_labelled_has_stock_s_gradients(count, aux):
    inputs = batch() | {"num_items_in_batch": count, "output_router_logits": aux}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    found = []
    for model in shared_pair("qwen3_moe"):
        model.train().zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert loss.isnan()
        found.append({name: p.grad for name, p in model.named_parameters()})
    error, where = worst_error(found[1], found[0])
    assert error <= CPU_TOLERANCE, where
    assert any(grad.abs().max() > 0 for grad in found[1].values()) == aux


@pytest.mark.parametrize("label", [-1, -200, 128, 4000])
def test_labels_outside_the_vocabulary_are_refused_as_in_stock(label):
    inputs = batch()
    inputs["labels"][0, 0] = label  # which nothing predicts
    train_both("qwen3_moe", lambda model: model(**inputs).loss)
    inputs["labels"][0, 5] = label
    for model in shared_pair("qwen3_moe"):
        with pytest.raises((IndexError, ValueError), match="out of bounds|Labels must lie in"):
            model.train()(**inputs)


def test_labels_of_32_bits_are_those_of_64():
    model, inputs = shared_pair("qwen3_moe")[1].train(), batch()
    want = model(**inputs).loss
    inputs["labels"] = inputs["labels"].int()
    assert torch.equal(model(**inputs).loss, want)


@pytest.mark.parametrize("count", [31, torch.tensor(31), torch.tensor(31.0)])
def test_num_items_in_batch_of_any_kind(count):
    train_both("qwen3_moe", lambda model: model(**batch(), num_items_in_batch=count).loss)


def test_hooks_on_the_head_and_the_experts_still_run():
    ours = load_ours("qwen3_moe").train()
    seen = []
    for name in (
        "lm_head",
        "model.layers.0.mlp",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts",
        "model.norm",
    ):
        ours.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    ours(**batch()).loss.backward()
    assert seen == [
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp",
        "model.norm",
        "lm_head",
    ]


def test_a_hook_that_changes_the_logits_changes_the_loss():
    losses = []
    for load in (load_stock, load_ours):
        model = load("qwen3_moe").train()
        model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
        losses.append(model(**batch()).loss.detach())
    assert relative_error(losses[1], losses[0]) <= CPU_TOLERANCE


def test_decoding_step_by_step_with_a_cache_of_the_callers():
    ids = batch()["input_ids"]
    steps = []
    with torch.no_grad():
        for model in shared_pair("qwen3_moe"):
            model.eval()
            cache = transformers.DynamicCache(config=model.config)
            steps.append(
                [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6)]
            )
    assert_close(steps[1], steps[0])


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=str,
)
def test_generation_strategies(options):
    prompt = batch()["input_ids"][:, :5]
    found = []
    for model in shared_pair("qwen3_moe"):
        torch.manual_seed(5)
        found.append(model.eval().generate(prompt, max_new_tokens=6, min_new_tokens=6, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ALL_KINDS)
def test_copies_and_pickles_are_whole_models(family):
    ours = load_ours(family).eval()
    inputs = batch("left")
    with torch.no_grad():
        expected = ours(**inputs).logits
        whole = io.BytesIO()
        torch.save(ours, whole)
        whole.seek(0)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(whole, weights_only=False)):
            assert type(other) is type(ours)
            assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in ours.parameters()})
            assert torch.equal(other(**inputs).logits, expected)
    state = pickle.loads(pickle.dumps(ours.state_dict()))
    load_stock(family).load_state_dict(state, strict=True)


@pytest.mark.parametrize("family", ALL_KINDS)
def test_casting_a_loaded_model(family):
    """.to(dtype), .float(): the same error against float32 as stock's, and float32 again afterwards."""
    reference, stock, ours = (
        load_stock(family).eval(),
        load_stock(family).eval().bfloat16(),
        load_ours(family).eval().bfloat16(),
    )
    inputs = batch()
    with torch.no_grad():
        exact = reference(**inputs).logits
        error, own = (relative_error(model(**inputs).logits.float(), exact) for model in (ours, stock))
        assert error <= 1.5 * own
        assert ours(**inputs).logits.dtype == stock(**inputs).logits.dtype
        assert_close(ours.float()(**inputs).logits, stock.float()(**inputs).logits)


@pytest.mark.parametrize("family", ALL_KINDS)
def test_autocast_is_as_near_to_float32_as_stock(family):
    errors = []
    reference, _ = shared_pair(family)
    exact = reference.train()(**batch()).loss.detach()
    for model in shared_pair(family):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(**batch()).loss
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        model.zero_grad(set_to_none=True)
        errors.append(relative_error(loss.detach(), exact))
    assert errors[1] <= 1.5 * errors[0] + 1e-3


def test_torch_compile_of_the_whole_model():
    inputs = batch()
    values = []
    for load in (load_stock, load_ours):
        torch.compiler.reset()
        model = load("qwen3_moe").train()
        out = torch.compile(model, backend="aot_eager")(**inputs, use_cache=False)
        out.loss.backward()
        values.append({"loss": out.loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    error, where = worst_error(values[1], values[0])
    assert error <= CPU_TOLERANCE, where


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    def loss_of(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" not in name and "lm_head" not in name)
        return model(**batch()).loss

    try:
        train_both("qwen3_moe", loss_of)
    finally:
        for model in shared_pair("qwen3_moe"):
            model.requires_grad_(True)


def test_only_router_and_experts_of_one_layer_trained():
    def loss_of(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.2.mlp" in name)
        return model(**batch()).loss

    try:
        train_both("qwen3_moe", loss_of)
    finally:
        for model in shared_pair("qwen3_moe"):
            model.requires_grad_(True)


@pytest.mark.parametrize("family", ALL_KINDS)
def test_gradients_of_gradients_are_refused_or_right(family):
    """A second derivative must never be silently wrong: either autograd's refusal, or stock's number."""

    def second(model):
        model.train()
        model.zero_grad(set_to_none=True)
        embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = model(inputs_embeds=embeds, labels=batch()["labels"], use_cache=False).loss
        (first,) = torch.autograd.grad(loss, embeds, create_graph=True)
        try:
            first.square().sum().backward()
            return model.get_output_embeddings().weight.grad.clone()
        finally:
            model.zero_grad(set_to_none=True)

    stock, ours = shared_pair(family)
    want = second(stock)
    try:
        found = second(ours)
    except RuntimeError as error:
        assert "trying to differentiate twice" in str(error)
    else:
        assert relative_error(found, want) <= 1e-4


def test_two_forwards_before_one_backward_keep_their_own_routing():
    first, second = batch(), batch("left")
    train_both("qwen3_moe", lambda model: model(**first).loss + model(**second).loss)


def test_accumulated_microbatches_equal_one_batch():
    """The sum over microbatches of sum-loss / num_items is the whole batch's mean loss."""
    ours = load_ours("qwen3_moe").train()
    whole = batch()
    count = (whole["labels"][:, 1:] != -100).sum()
    ours(**whole).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    for row in range(2):
        ours(**{key: value[row : row + 1] for key, value in whole.items()}, num_items_in_batch=count).loss.backward()
    error, where = worst_error({name: p.grad for name, p in ours.named_parameters()}, expected)
    assert error <= CPU_TOLERANCE, where


def test_router_loss_does_not_grow_with_accumulation():
    """The same microbatch four times is the same gradient as once, router loss included. Stock's would be four times as
    large.
    """
    ours = load_ours("qwen3_moe").train()
    one = batch()
    count = (one["labels"][:, 1:] != -100).sum()
    losses = []
    for times in (1, 4):
        ours.zero_grad()
        total = 0.0
        for _ in range(times):
            loss = ours(**one, output_router_logits=True, num_items_in_batch=times * count).loss
            loss.backward()
            total += float(loss)
        losses.append((total, ours.get_parameter("model.layers.0.mlp.gate.weight").grad.clone()))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert relative_error(losses[1][1], losses[0][1]) <= CPU_TOLERANCE


@pytest.mark.parametrize("family", ALL_KINDS)
def test_on_the_cpu_ties_go_to_the_experts_that_stock_chooses(family):
    chosen = []
    for load in (load_stock, load_ours):
        model = load(family)
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.data[:4], parameter.data[4:] = parameter.data[0], parameter.data[5]
        for module in model.modules():
            if hasattr(module, "_apply_gate"):
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: chosen[-1].append([*args, *kwargs.values()][1]), with_kwargs=True
                )
        chosen.append([])
        model.train()(**batch())
    assert len(chosen[0]) == len(chosen[1]) > 0
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(*chosen, strict=True))


def test_router_logits_from_the_configuration():
    outputs = []
    for load in (load_stock, load_ours):
        model = load("qwen3_moe", output_router_logits=True).train()
        out = model(**batch())
        outputs.append({"loss": out.loss, "aux_loss": out.aux_loss, "router_logits": out.router_logits})
    assert_close(outputs[1], outputs[0])


def test_our_class_is_a_subclass_of_transformers_and_of_the_stock_class():
    assert issubclass(expertmesh.AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    stock, ours = shared_pair("qwen3_moe")
    assert isinstance(ours, type(stock))
    assert (type(ours).__name__, type(ours).__module__) == (type(stock).__name__, type(stock).__module__)


def test_transformers_own_auto_class_still_gives_stock_models():
    shared_pair("qwen3_moe")
    model = load_stock("qwen3_moe")
    assert type(model) is transformers.Qwen3MoeForCausalLM
    assert {type(module).__mro__[1] for module in model.modules() if type(module).__name__ == "Qwen3MoeExperts"} == {
        torch.nn.Module
    }
