"""Test by running both whether a twin equals code without a known fingerprint.

A tiny stock model is created from the family's classes and the flags of the user's configuration: few layers, few
experts, narrow, float32, on the CPU. A copy of it gets the twin for the class in question. The twin is accepted if both
models give the same logits and the same gradient of every parameter, for full rows, padding, packed documents and a
cache. If several twins are accepted, the one closest in bfloat16 is chosen, because norms differ only in rounding.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from expertmesh.families.table import Rule
from expertmesh.twins import twin

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # relative to the largest value, in float32
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # one entry per layer
#: {upper limit: configuration keys that it applies to}; keys that a family lacks are ignored
_LIMITS = {
    1: "topk_group first_k_dense_replace",
    2: "num_experts_per_tok moe_k moe_topk n_group linear_num_key_heads",
    4: "num_attention_heads mamba_num_heads linear_num_value_heads",
    5: "sliding_window",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size head_dim "
    "shared_intermediate_size q_lora_rank kv_lora_rank mamba_head_dim ssm_state_size moe_latent_size",
    32: "hidden_size intermediate_size",
    64: "vocab_size",
    128: "max_position_embeddings",
}
_results: dict[Any, Rule | None] = {}
#: errors of a twin that expects other attributes or shapes than the class has
_MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError, AssertionError)


def probe(stock: Any, config: Any, cls: type, rules: list[Rule], fused: dict[Any, Any]) -> Rule | None:
    """Return the rule whose twin equals `cls` in models of the class `stock`, or None if there is none.

    fused: {class: mixin of its twin} for classes that are fast already. The tiny model uses these twins, too, so that
    the probed one runs with the same neighbors as in the user's model.
    """
    small, attention = tiny(config), config._attn_implementation
    settings = json.dumps(small.to_dict(), sort_keys=True, default=str)
    key = (stock, settings, attention, cls, *rules, *fused.items())
    if key not in _results:
        with _isolated():
            model, expected = _stock_model(stock, small)
            tried = {rule: _error(model, expected, attention, cls, rule, fused) for rule in rules if model is not None}
        errors = {rule: error for rule, error in tried.items() if error is not None}
        _results[key] = min(errors, key=errors.__getitem__, default=None)
    return _results[key]


@contextmanager
def _isolated() -> Iterator[None]:
    """Context manager for float32 on the CPU, also during loading onto the meta device. Restores the RNG state."""
    with local_torch_dtype(torch.float32), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        yield


def _stock_model(stock: Any, small: Any) -> tuple[Any, dict[str, Any]]:
    """Return a tiny stock model and its results for each case; (None, {}) if this family has no tiny model."""
    small._attn_implementation = small._experts_implementation = None
    try:
        model = stock(small)
        _randomize(model)
        expected = {name: _run(model, name) for name in ("rows", "padded", "packed", "cached")}
    except _MISFITS as error:
        log.debug("no tiny %s: %s", stock.__name__, error)
        return None, {}
    return model, {name: values for name, values in expected.items() if values is not None}


def _error(
    model: Any, expected: dict[str, Any], attention: str | None, cls: Any, rule: Rule, fused: dict[Any, Any]
) -> float | None:
    """Return the error of the rule's twin in bfloat16, or None if it is wrong in float32 or does not fit the class."""
    ours = copy.deepcopy(model)
    ours.config._attn_implementation = attention or model.config._attn_implementation
    _make_fast(ours, fused)
    modules = [module for module in ours.modules() if type(module) is cls]
    try:
        if not modules or any(rule.fast.why_not(module) for module in modules):
            return None
        _make_fast(ours, {cls: rule.fast})
        if not all(_same(_run(ours, name), values) for name, values in expected.items()):
            return None
        want, got = (_run(copy.deepcopy(x).bfloat16(), "rows") for x in (model, ours))
    except _MISFITS as error:
        log.debug("%s is no twin of %s: %s", rule.fast.__name__, cls.__name__, error)
        return None
    assert want is not None and got is not None
    return float((want[0].float() - got[0].float()).abs().max())


def _make_fast(model: nn.Module, fasts: dict[Any, Any]) -> None:
    for module in model.modules():
        cls: Any = type(module)
        if cls in fasts:
            module.__class__ = twin(cls, fasts[cls])


def tiny(config: Any) -> Any:
    """Return a configuration with the same flags and small sizes, with one layer of each kind, but at least two."""
    config = copy.deepcopy(config.get_text_config())
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    lists = {name: list(getattr(config, name)) for name in _LISTS if getattr(config, name, None)}
    kinds = list(zip(*lists.values(), strict=False))
    chosen = list(dict.fromkeys(kinds.index(kind) for kind in kinds)) or [0]
    chosen = chosen if len(chosen) > 1 else [chosen[0]] * 2
    values: dict[str, Any] = {name: [whole[i] for i in chosen] for name, whole in lists.items()}
    values |= {"num_hidden_layers": len(chosen), "num_nextn_predict_layers": 0, "pad_token_id": 0}
    limits = {name: size for size, names in _LIMITS.items() for name in names.split()}
    values |= {
        name: min(size, value) for name, size in limits.items() if isinstance(value := getattr(config, name, None), int)
    }
    if heads and kv_heads:
        values |= {"num_key_value_heads": min(kv_heads, 4 if kv_heads == heads else 2)}
    for name, value in values.items():
        derived = isinstance(getattr(type(config), name, None), property)  # computed from other keys
        if hasattr(config, name) and not derived:
            setattr(config, name, value)
    return config


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Draw weights that make routing far from uniform, and biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(noise * 0.2 if weight.ndim > 1 else weight + noise * 0.1)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)


def _run(model: Any, name: str) -> tuple[torch.Tensor, ...] | None:
    """Return logits and all gradients, or None if the model raises ValueError, as some do for packed rows."""
    ids = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": name == "cached"}
    if name == "padded":
        mask[0, :4] = 0
        inputs["attention_mask"] = mask
    if name == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    model.train(name != "cached").zero_grad()
    try:
        out = model(**inputs)
    except ValueError:
        return None
    if name == "cached":
        again = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        return out.logits.detach(), again.logits.detach()
    logits = out.logits * mask[..., None]  # results at padding may differ
    logits.float().square().mean().backward()
    grads = (torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())
    return logits.detach(), *grads


def _same(got: tuple[torch.Tensor, ...] | None, want: tuple[torch.Tensor, ...]) -> bool:
    return got is not None and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-6)
        for a, b in zip(got, want, strict=True)
    )
