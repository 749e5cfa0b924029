"""fuse(): which classes become fast, what the report says, what a switch does, what happens when Transformers moves."""

import copy
import importlib
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers import AutoModelForCausalLM as StockAuto

import expertmesh
from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.rows import relative_error
from expertmesh.bench.tiny import tiny_config
from expertmesh.families.table import RULES, Rule
from expertmesh.fuse import FUSIONS
from expertmesh.kernels import flash_attention
from expertmesh.layers import attention
from expertmesh.moe import experts
from expertmesh.twins import Fast, fingerprint


def _report(model):
    return {row.name: row for row in model.fusion_report()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.fusion}-{rule.like}")
def test_every_fingerprint_is_that_of_the_code_it_names(rule):
    model_type, cls = rule.like.split(".")
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    assert rule.matches(getattr(modeling, cls)), (
        f"Transformers changed {rule.like}: compare it with {rule.fast.__name__}"
    )


EXPECTED = {
    "qwen3_moe": {"experts", "router", "rms_norm", "qk_norm_rope", "add_norm", "swiglu", "linear_cross_entropy"},
    "deepseek_v3": {"experts", "router", "rms_norm", "mla_rope", "add_norm", "swiglu", "linear_cross_entropy"},
    "gpt_oss": {"experts", "router", "rms_norm", "sink_attention", "add_norm", "linear_cross_entropy"},
    "nemotron_h": {"experts", "router", "rms_norm", "add_norm", "mamba2", "swiglu", "linear_cross_entropy"},
    "mixtral": {"experts", "router", "rms_norm", "rope", "add_norm", "linear_cross_entropy"},
    "phimoe": {"experts", "rope", "linear_cross_entropy"},
    "glm4_moe": {"experts", "router", "rms_norm", "rope", "add_norm", "swiglu", "linear_cross_entropy"},
}
EXPECTED |= {family: EXPECTED["mixtral"] for family in ("olmoe", "granitemoe")}
EXPECTED |= {
    family: EXPECTED["glm4_moe"] for family in ("qwen3_next", "qwen3_5_moe_text", "ernie4_5_moe", "hunyuan_v1_moe")
}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_fusions_of_a_family_are_on(family):
    report = _report(AutoModelForCausalLM.from_config(tiny_config(family)))
    assert EXPECTED[family] == {name for name, row in report.items() if row.on}
    assert all(row.on or row.reason for row in report.values()), "a fusion that is off must say why"


def test_a_class_that_transformers_rewrote_stays_stock_and_the_report_says_so(monkeypatch):
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    def forward(self, hidden_states):
        scores = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight).sigmoid()
        weights, ids = torch.topk(scores, self.top_k)
        return scores, weights, ids

    monkeypatch.setattr(OlmoeTopKRouter, "forward", forward)
    fingerprint.cache_clear()
    try:
        model = AutoModelForCausalLM.from_config(tiny_config("olmoe"))
    finally:
        fingerprint.cache_clear()
    row = _report(model)["router"]
    assert not row.on and "OlmoeTopKRouter runs code of its own" in row.reason
    assert not any(isinstance(m, Fast) and "Router" in type(m).__name__ for m in model.modules())


def test_the_fingerprint_sees_code_and_nothing_else():
    class One:
        def forward(self, x: int) -> int:
            """Says something."""
            return x + 1  # a comment

    class Same:
        def forward(self, x):
            return x + 1

    class Other:
        def forward(self, x):
            return x + 2

    assert fingerprint(One) == fingerprint(Same) != fingerprint(Other)
    assert fingerprint(torch.nn.Linear) != fingerprint(torch.nn.Bilinear)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_a_single_fusion_can_be_switched_off(fusion):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), fused={fusion: False})
    row = _report(model)[fusion]
    assert not row.on and row.reason
    if fusion == "experts":
        assert model.config._experts_implementation == "grouped_mm"


def test_an_unknown_fusion_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'router'"):
        AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), fused={"ruoter": False})


def test_fuse_refuses_what_is_no_transformers_model():
    with pytest.raises(TypeError, match="Transformers model"):
        fuse(torch.nn.Linear(2, 2))


def test_asking_for_another_experts_implementation_is_respected_and_reported():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), experts_implementation="eager")
    row = _report(model)["experts"]
    assert not row.on and "eager" in row.reason and model.config._experts_implementation == "eager"


def test_one_configuration_object_serves_stock_and_ours_in_any_order(tmp_path):
    config = tiny_config("qwen3_moe")
    names = [
        auto.from_config(config).config._experts_implementation
        for auto in (StockAuto, AutoModelForCausalLM, StockAuto, AutoModelForCausalLM)
    ]
    assert names == ["grouped_mm", "expertmesh"] * 2
    StockAuto.from_config(config).save_pretrained(tmp_path)
    loaded = [auto.from_pretrained(tmp_path, config=config) for auto in (AutoModelForCausalLM, StockAuto)]
    assert [model.config._experts_implementation for model in loaded] == ["expertmesh", "grouped_mm"]


def test_a_model_fused_in_place_leaves_its_configuration_as_it_was():
    stock = StockAuto.from_config(tiny_config("gpt_oss"))
    config = stock.config
    before = config._experts_implementation, config._attn_implementation
    model = fuse(stock)
    assert (
        model.config._experts_implementation == "expertmesh" and model.model.layers[0].self_attn.config is model.config
    )
    assert (config._experts_implementation, config._attn_implementation) == before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_stock_model_made_from_a_fused_ones_configuration_runs_stock_code(family, tmp_path, monkeypatch):
    """However it got there; one object serves both, so it is the modules that differ."""
    model, reference = fuse(StockAuto.from_config(tiny_config(family))), StockAuto.from_config(tiny_config(family))
    model.save_pretrained(tmp_path)
    reference.load_state_dict(model.state_dict())
    config, ids = model.config, torch.arange(24).view(2, 12)
    stocks = [
        StockAuto.from_config(config),
        StockAuto.from_config(copy.deepcopy(config)),
        type(model).__stock__(pickle.loads(pickle.dumps(config))),
        StockAuto.from_pretrained(tmp_path, config=config),
        StockAuto.from_pretrained(tmp_path),
        StockAuto.from_config(AutoConfig.from_pretrained(tmp_path)),
    ]
    names = config._experts_implementation, config._attn_implementation
    assert model.config is config is model.model.config is model.model.layers[0].self_attn.config
    copied = copy.deepcopy(model)
    monkeypatch.setattr(experts, "experts_forward", mock.Mock(side_effect=AssertionError("ours")))
    monkeypatch.setattr(attention, "sink_attention", mock.Mock(side_effect=AssertionError("ours")))
    monkeypatch.setattr(flash_attention, "supports", lambda *_: True)
    monkeypatch.setattr(flash_attention, "flash_attention", mock.Mock(side_effect=AssertionError("ours")))
    seen = torch.ones_like(ids)
    seen[0, :3] = 0
    for stock in stocks:
        stock.load_state_dict(model.state_dict())
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": seen}):
            assert torch.equal(stock(**inputs).logits, reference(**inputs).logits)
        assert stock.generate(ids, max_new_tokens=2).shape == (2, 14)
    assert (config._experts_implementation, config._attn_implementation) == names
    for ours in (model, copied):
        with pytest.raises(AssertionError, match="ours"):
            ours(input_ids=ids)


_IMPORTS = """
import os, warnings
import torch, transformers, trl
from transformers import AutoModelForCausalLM, Trainer, masking_utils, modeling_utils
from transformers.distributed import fsdp
from transformers.integrations import moe
from trl import SFTTrainer
def seen():
    tables = moe.ExpertsInterface._global_mapping, modeling_utils.AttentionInterface._global_mapping
    code = [dict(vars(module)) for module in (fsdp, masking_utils, modeling_utils, moe)]
    return dict(os.environ), list(warnings.filters), [*map(dict, tables), *code]
before = seen()
import expertmesh
for name in expertmesh.__all__:
    getattr(expertmesh, name)
for one, other in zip(before[:2], seen()[:2], strict=True):
    assert one == other, (one, other)
for one, other in zip(before[2], seen()[2], strict=True):
    assert all(other[key] is value for key, value in one.items())
"""


def test_importing_changes_nothing_for_others():
    """Environment, warnings, and what stock models find in Transformers' tables and modules."""
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)


def test_the_report_is_printed_once_per_kind_of_model(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["expertmesh.families.report"], "_logged", set())
    for _ in range(2):
        AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    printed = capsys.readouterr().err
    assert printed.count("expertmesh: Qwen3MoeForCausalLM") == 1
    assert "linear_cross_entropy on" in printed


def test_a_model_without_experts_stays_stock_and_the_log_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["expertmesh.families.report"], "_logged", set())
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is type(StockAuto.from_config(config))
    assert not any(isinstance(module, Fast) for module in model.modules()) and not model._forward_pre_hooks
    assert "stays stock" in (said := capsys.readouterr().err) and "use_liger_kernel=True" in said


def test_public_names_are_what_they_say():
    assert callable(expertmesh.fuse) and isinstance(expertmesh.AutoModelForCausalLM, type)
    with pytest.raises(AttributeError, match="AutoModelForCausalLM"):
        expertmesh.AutoModelForCasualLM  # noqa: B018


def test_rules_are_for_known_switches():
    assert {rule.fusion for rule in RULES} <= set(FUSIONS)
    assert all(isinstance(rule, Rule) and issubclass(rule.fast, Fast) for rule in RULES)


_ELSEWHERE = """
import sys, torch
model, inputs = torch.load(sys.argv[1], weights_only=False)
outputs = model(**inputs)
outputs.loss.backward()
grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
torch.save(({"loss": outputs.loss.detach(), **grads}, type(outputs.logits).__name__), sys.argv[1])
"""


def test_a_pickled_model_comes_back_whole_in_another_process(tmp_path):
    """There no class of ours exists yet; with two documents in a row a model that is half fused mixes them."""
    model = AutoModelForCausalLM.from_config(tiny_config("nemotron_h")).train()
    ids = torch.arange(24)[None]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).repeat(2)[None]}
    torch.save((model, inputs), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(tmp_path / "model.pt")], check=True)
    found, logits = torch.load(tmp_path / "model.pt")
    loss = model(**inputs).loss
    loss.backward()
    assert logits == "DeferredLogits" and torch.equal(found.pop("loss"), loss.detach())
    for name, grad in found.items():
        assert relative_error(grad, model.get_parameter(name).grad) < 1e-6, name
