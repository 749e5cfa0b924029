"""The report of fusions says the same thing of a model in all its lines."""

import logging

import pytest
from torch import nn
from transformers import AutoModelForCausalLM as Stock

from expertmesh import AutoModelForCausalLM, fuse
from expertmesh.bench.tiny import tiny_config
from expertmesh.families.report import NOT_NEEDED, print_report


def row(model, name):
    return next(row for row in model.fusion_report() if row.name == name)


@pytest.mark.parametrize(
    ("family", "fusion", "other"),
    [
        ("qwen3_moe", "rope", "qk_norm_rope"),
        ("deepseek_v3", "rope", "mla_rope"),
        ("gpt_oss", "rope", "sink_attention"),
        ("mixtral", "swiglu", None),
    ],
)
def test_what_no_module_needs_is_named_with_what_its_modules_have(family, fusion, other):
    reason = row(AutoModelForCausalLM.from_config(tiny_config(family)), fusion).reason
    assert reason == (f"{NOT_NEEDED} in addition to {other}" if other else NOT_NEEDED)


def test_what_is_on_in_a_part_of_a_model_is_said_so(caplog):
    model = AutoModelForCausalLM.from_config(tiny_config("flex_olmo"))
    assert row(model, "add_norm").on and "FlexOlmoDecoderLayer" in row(model, "add_norm").reason
    with caplog.at_level(logging.INFO, logger="expertmesh"):
        print_report(nn.Identity(), model.fusion_report())
    line = next(line for line in caplog.text.splitlines() if line.startswith("  add_norm"))
    assert "on " in line and "(not everywhere: FlexOlmoDecoderLayer runs code of its own)" in line


def test_a_module_of_somebody_else_is_named():
    model = Stock.from_config(tiny_config("phimoe"))
    for layer in model.model.layers:
        layer.input_layernorm = nn.RMSNorm(32)
    assert row(fuse(model), "rms_norm").reason == "RMSNorm is not a class of Transformers"
