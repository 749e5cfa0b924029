"""Code that no fingerprint knows: on where its twin computes the same, else off, and the report says which."""

import time

import pytest
import torch
from torch.nn import functional as F

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.parity import Case, compare_case
from expertmesh.bench.tiny import FAMILIES, tiny_config, tiny_model
from expertmesh.families import probe
from expertmesh.families.table import RULES, Rule
from expertmesh.fuse import fuse
from expertmesh.twins import fingerprint


@pytest.fixture
def rewritten(monkeypatch):
    """Gives a class another forward, as a later Transformers might."""

    def change(cls, forward):
        monkeypatch.setattr(cls, "forward", forward)
        fingerprint.cache_clear()
        probe._results.clear()

    yield change
    monkeypatch.undo()
    fingerprint.cache_clear()
    probe._results.clear()


def row(model, fusion):
    return next(row for row in model.fusion_report() if row.name == fusion)


def router_forward(scoring):
    def forward(self, hidden):
        hidden = hidden.flatten(0, -2) if hidden.ndim > 2 else hidden
        logits = F.linear(hidden, self.weight)
        scores = scoring(logits.float())
        best = scores.topk(self.top_k, dim=-1)
        weights = best.values / best.values.sum(-1, keepdim=True) if self.norm_topk_prob else best.values
        return logits, weights.to(logits.dtype), best.indices

    return forward


def test_a_rewritten_forward_that_computes_the_same_is_on_by_probe(rewritten):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    rewritten(Qwen3MoeTopKRouter, router_forward(lambda x: x.softmax(-1)))
    stock = tiny_model("qwen3_moe")
    model = fuse(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=torch.float32))
    assert row(model, "router").on and row(model, "router").verified == "probe"
    assert row(model, "rms_norm").verified == "table" and row(model, "swiglu").verified == "table"
    model.load_state_dict(stock.state_dict())
    assert not [
        r for case in (Case("plain"), Case("aux", aux=True)) for r in compare_case(stock, model, case) if not r.ok
    ]


@pytest.mark.parametrize("scoring", [torch.sigmoid, lambda x: (x * 1.01).softmax(-1), lambda x: x.softmax(-1) + 1e-3])
def test_a_rewritten_forward_that_computes_anything_else_is_off(scoring, rewritten):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    rewritten(Qwen3MoeTopKRouter, router_forward(scoring))
    off = row(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")), "router")
    assert not off.on and off.reason == "Qwen3MoeTopKRouter runs code of its own"


def test_of_norms_that_are_equal_in_float32_the_one_that_rounds_alike_is_taken(rewritten):
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide / (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (self.weight.float() * wide).to(x.dtype)  # Llama's rounds before the weight

    rewritten(MixtralRMSNorm, forward)
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    assert row(model, "rms_norm").verified == "probe" and model.model.norm.scale == "float32"


def attention_forward(scale):
    """Qwen3's attention, otherwise written."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past=None, **kwargs):
        past = next((kwargs.pop(n) for n in ("cache", "past_key_values") if kwargs.get(n) is not None), past)
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        heads = [proj(hidden_states).reshape(shape) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = self.q_norm(heads[0]).transpose(1, 2), self.k_norm(heads[1]).transpose(1, 2), heads[2].transpose(1, 2)
        q, k = qwen.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        attend = qwen.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, qwen.eager_attention_forward
        )
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling * scale,
                              sliding_window=self.sliding_window, **kwargs)  # fmt: skip
        return self.o_proj(out.flatten(-2)), weights

    return forward


@pytest.mark.parametrize(("scale", "on"), [(1.0, True), (1.05, False)])
def test_attention_is_probed_with_positions_and_a_cache(scale, on, rewritten):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    rewritten(Qwen3MoeAttention, attention_forward(scale))
    found = row(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")), "qk_norm_rope")
    assert found.on == on and found.verified == ("probe" if on else "")


def test_every_twin_that_may_be_probed_is_proven_where_its_table_is_lost(rewritten, monkeypatch):
    """As on the day of a release that rewrites everything: the hand-tuned families keep all they can be proven to."""
    monkeypatch.setattr(
        Rule,
        "matches",
        lambda self, cls: not self.fast.probed and fingerprint(cls, self.fast.stands_for) == self.code,
    )
    for family, fusions in {
        "qwen3_moe": "rms_norm swiglu router qk_norm_rope add_norm",
        "deepseek_v3": "rms_norm swiglu router mla_rope add_norm",
        "gpt_oss": "rms_norm router sink_attention add_norm",
        "nemotron_h": "rms_norm router mamba2 swiglu",  # its block is known by its code alone
    }.items():
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        lost = [fusion for fusion in fusions.split() if row(model, fusion).verified != "probe"]
        assert not lost, (family, lost)


def test_a_probe_leaves_no_trace_and_takes_under_a_second(rewritten):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    rewritten(Qwen3MoeTopKRouter, router_forward(lambda x: x.softmax(-1)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = tiny_config("qwen3_moe")
    before, began = config.to_dict(), time.perf_counter()
    proven = probe.probe(type(tiny_model("qwen3_moe", seed=5)), config, Qwen3MoeTopKRouter,
                         [rule for rule in RULES if rule.fusion == "router"], {})  # fmt: skip
    assert proven is not None and proven.fast.__name__ == "FastSoftmaxRouter"
    assert time.perf_counter() - began < 5  # a second on a machine that does nothing else
    torch.manual_seed(5)
    assert config.to_dict() == before and torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_made_tiny(family):
    from transformers import AutoModelForCausalLM as Stock

    with probe._isolated():
        stock = type(Stock.from_config(tiny_config(family)))
        made = probe._stock_model(stock, probe.tiny(tiny_config(family)))
    assert made[0] is not None and {"rows", "padded", "cached"} <= made[1].keys()
