"""The Mamba2 mixer's fast twin: taken whenever a model trains, equal to stock, and never across documents."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import DataCollatorWithFlattening
from transformers.models.nemotron_h import modeling_nemotron_h

from expertmesh.bench.parity import CPU_TOLERANCE, Case, compare_case
from expertmesh.bench.rows import relative_error, worst_error
from expertmesh.bench.tiny import tiny_config, tiny_model
from expertmesh.fuse import fuse
from expertmesh.layers import base_model, mamba2
from expertmesh.layers.rows import inspect_rows
from tests.models import load_ours, load_stock, shared_pair

LENGTHS = [5, 1, 18]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture
def ran(monkeypatch) -> list[torch.Tensor | None]:
    """What each run of the fast path knew of where documents start."""
    starts: list[torch.Tensor | None] = []
    function = mamba2.mamba2

    def recorded(projected, weights, options, start, mask):
        starts.append(start)
        return function(projected, weights, options, start, mask)

    monkeypatch.setattr(mamba2, "mamba2", recorded)
    return starts


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mixer_of(model) -> torch.nn.Module:
    return model.model.layers[0].mixer


def told() -> dict[str, dict]:
    """Every way to say where documents begin."""
    documents = [{"input_ids": part.tolist()} for part in tokens()[0].split(LENGTHS)]
    batches = {
        name: DataCollatorWithFlattening(return_tensors="pt", **{name: True})(documents)
        for name in ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")
    }
    return batches | {"in one row of two": {"position_ids": POSITIONS, "input_ids": tokens().expand(2, -1)}}


@pytest.mark.parametrize("way", told())
def test_packed_documents_give_what_each_gives_alone(way, ran):
    model = load_ours("nemotron_h")
    with torch.no_grad():
        logits = model(**told()[way], use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in tokens().split(LENGTHS, 1)]
    assert ran[0] is not None and ran[1] is None
    assert relative_error(logits, torch.cat(alone, 1).expand(len(logits), -1, -1)) <= CPU_TOLERANCE


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_know_the_documents(reentrant, ran):
    plain, recomputed = load_ours("nemotron_h").train(), load_ours("nemotron_h").train()
    recomputed.activation_checkpointing_enable({"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    inputs = {"input_ids": tokens(), "labels": tokens(), "position_ids": POSITIONS}
    for model in (plain, recomputed):
        model(**inputs).loss.backward()
    assert len(ran) == 3 and all(start is not None for start in ran)
    assert worst_error(gradients(recomputed), gradients(plain))[0] <= CPU_TOLERANCE


def test_where_documents_begin_is_found_once_per_forward(monkeypatch):
    found = []
    monkeypatch.setattr(base_model, "inspect_rows", lambda *args: found.append(args) or inspect_rows(*args))
    model = tiny_model("nemotron_h", layers_block_type=["linear_attention", "moe", "linear_attention"])
    fuse(model)(input_ids=tokens(), position_ids=POSITIONS, use_cache=False)
    assert len(found) == 1


def test_rows_are_cut_where_positions_begin_anew_whatever_mask_stands_beside_them(ran):
    model = load_ours("nemotron_h")
    mask = torch.ones_like(tokens())
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": POSITIONS, "attention_mask": mask}):
        model(input_ids=tokens(), use_cache=False, **inputs)
    assert ran[:2] == [None, None] and ran[2] is not None
    with pytest.raises(ValueError, match="A row holds several documents"):
        model(input_ids=tokens(), use_cache=True, position_ids=POSITIONS)


def test_a_loss_needs_no_cache_though_the_configuration_asks_for_one(ran):
    stock, ours = load_stock("nemotron_h").train(), load_ours("nemotron_h").train()
    assert ours.config.use_cache
    outs = [model(input_ids=tokens(), labels=tokens()) for model in (stock, ours)]
    for out in outs:
        out.loss.backward()
    assert ours.eval()(input_ids=tokens(), labels=tokens()).past_key_values is outs[1].past_key_values is None
    assert len(ran) == 2
    assert relative_error(outs[1].loss.detach(), outs[0].loss.detach()) <= CPU_TOLERANCE
    assert worst_error(gradients(ours), gradients(stock))[0] <= CPU_TOLERANCE


def test_a_cache_that_is_asked_for_is_filled_as_in_stock(ran):
    stock, ours = shared_pair("nemotron_h")
    for training in (True, False):
        caches = []
        for model in (stock, ours):
            out = model.train(training)(input_ids=tokens(), use_cache=True)
            caches.append(out.past_key_values.layers[0].recurrent_states)
            again = model.eval()(input_ids=tokens()[:, :1], past_key_values=out.past_key_values).logits.detach()
            caches.append(again)
        assert not ran and relative_error(caches[3], caches[1]) <= CPU_TOLERANCE


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_adapters_on_the_projections_learn(target, ran):
    """PEFT itself refuses out_proj of this family, because stock's fused path goes past it; ours does not."""
    found = []
    for load in (load_stock, load_ours):
        model = load("nemotron_h").train()
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(target_modules=[target], init_lora_weights=False), model.model.layers)
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        found.append({name: g for name, g in gradients(model).items() if "lora" in name} | {"loss": loss.detach()})
    assert len(ran) == 1 and len(found[0]) == 3 and all(g.abs().max() > 0 for g in found[1].values())
    assert worst_error(found[1], found[0])[0] <= CPU_TOLERANCE


@pytest.mark.parametrize("watched", ["conv1d", "norm"])
def test_what_somebody_hooked_is_called(watched, ran):
    model, calls = load_ours("nemotron_h"), []
    getattr(mixer_of(model), watched).register_forward_hook(lambda *args: calls.append(1))
    model(input_ids=tokens(), use_cache=False, position_ids=torch.arange(24)[None])
    assert not ran and len(calls) == (watched == "norm")  # stock's own code calls the one and not the other
    with pytest.raises(ValueError, match="packed sequences"):  # and cannot keep documents apart without a library
        model(input_ids=tokens(), use_cache=False, position_ids=POSITIONS)


@pytest.mark.parametrize("latent", [16, None])
def test_with_every_feature_on_all_gradients_equal_stock(latent):
    """Latent experts or not, shared experts, limited groups, biases; padded, packed, recomputed."""
    changes = {"use_bias": True, "mlp_bias": True, "n_groups": 4, "mamba_num_heads": 4, "chunk_size": 5}
    changes["moe_latent_size"] = latent
    kinds = ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "mlp", "linear_attention"]
    stock = tiny_model("nemotron_h", layers_block_type=kinds, **changes)
    ours = fuse(copy.deepcopy(stock))
    rows = {row.name: row for row in ours.fusion_report()}
    assert rows["mamba2"].count == 3 and rows["experts"].count == rows["router"].count == 2
    assert rows["add_norm"].count == 7 + 2
    for case in (Case("a", "left"), Case("b", "right", checkpointing=True), Case("c", "packed", checkpointing=True)):
        assert not [row for row in compare_case(stock, ours, case) if not row.ok]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mamba_head_dim": 8}, "not powers of two"),
        ({"ssm_state_size": 24}, "not powers of two"),
        ({"conv_kernel": 3}, "over 3 tokens"),
        ({"mamba_hidden_act": "gelu"}, "with gelu"),
    ],
)
def test_what_the_kernels_do_not_have_stays_stock_and_the_report_says_why(changes, reason):
    model = fuse(tiny_model("nemotron_h", **changes))
    row = next(row for row in model.fusion_report() if row.name == "mamba2")
    assert not row.on and reason in row.reason


def test_other_families_with_this_mixer_have_the_fast_one(ran):
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        **{key: getattr(tiny_config("mixtral"), key) for key in ("vocab_size", "hidden_size", "num_attention_heads")},
        intermediate_size=16, num_hidden_layers=2, layer_types=["mamba", "attention"], num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16, mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1,
    )  # fmt: skip
    stock = GraniteMoeHybridForCausalLM(config)
    ours = fuse(copy.deepcopy(stock))
    for case in (Case("plain"), Case("left padding", "left")):
        assert not [row for row in compare_case(stock, ours, case) if not row.ok]
    assert len(ran) == 2  # where no cache was asked for


def test_the_scan_of_stock_is_the_one_that_is_replaced():
    names = ("apply_mask_to_padding_states", "causal_conv1d_fn", "mamba2_chunk_scan")
    assert all(hasattr(modeling_nemotron_h, name) for name in names)


def test_decays_are_taken_in_float32_from_a_model_in_bfloat16(monkeypatch):
    seen = []

    def noting(projected, weights, options, start, mask):
        seen.append(weights.A_H)
        return function(projected, weights, options, start, mask)

    function = mamba2.mamba2
    monkeypatch.setattr(mamba2, "mamba2", noting)
    model = load_ours("nemotron_h", dtype=torch.bfloat16).train()
    model(input_ids=tokens(), labels=tokens())
    mixers = [module for module in model.modules() if hasattr(module, "A_log")]
    assert len(seen) == len(mixers) and mixers[0].A_log.dtype == torch.bfloat16
    for decay, mixer in zip(seen, mixers, strict=True):
        assert torch.equal(decay, -mixer.A_log.float().exp())
