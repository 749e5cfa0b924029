"""Whether a twin equals code that no fingerprint knows: found out by running both.

A tiny stock model is made of the family's classes and the user's own flags (few layers, few experts, narrow, float32,
on the CPU), and beside it one whose modules of the class in question are the twin's. The twin holds if both give the
same logits and the same gradient of every parameter, for whole rows, padding, packed documents, and a cache. Among
several that do, the one nearest in bfloat16 is taken: norms differ only in where they round.
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
TOLERANCE = 1e-4  # of the largest value, in float32
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # one entry a layer
#: the most that keys of a tiny configuration say; keys that a family lacks are passed by
_MOST = {
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
_found: dict[Any, Rule | None] = {}
#: what a twin raises that looks for other attributes or shapes than a class has
_MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError, AssertionError)


def probe(stock: Any, config: Any, cls: type, rules: list[Rule], done: dict[Any, Any]) -> Rule | None:
    """The rule whose twin computes what modules of `cls` do in models of the class `stock`; None if none does.

    done: classes that are fast already, and the mixins of their twins, so that this one finds its surroundings as in
    the user's model.
    """
    small, attention = tiny(config), config._attn_implementation
    said = json.dumps(small.to_dict(), sort_keys=True, default=str)
    key = (stock, said, attention, cls, *rules, *done.items())
    if key not in _found:
        with _undisturbed():
            model, expected = _stock_model(stock, small)
            tried = {rule: _error(model, expected, attention, cls, rule, done) for rule in rules if model is not None}
        errors = {rule: error for rule, error in tried.items() if error is not None}
        _found[key] = min(errors, key=errors.__getitem__, default=None)
    return _found[key]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever is going on around, such as loading onto the meta device: float32 on the CPU, and no number drawn."""
    with local_torch_dtype(torch.float32), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        yield


def _stock_model(stock: Any, small: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny stock model and what it gives; None if this family cannot be made tiny so, and nothing can be proven."""
    small._attn_implementation = small._experts_implementation = None
    try:
        model = stock(small)
        _draw(model)
        expected = {name: _run(model, name) for name in ("rows", "padded", "packed", "cached")}
    except _MISFITS as error:
        log.debug("no tiny %s: %s", stock.__name__, error)
        return None, {}
    return model, {name: values for name, values in expected.items() if values is not None}


def _error(
    model: Any, expected: dict[str, Any], attention: str | None, cls: Any, rule: Rule, done: dict[Any, Any]
) -> float | None:
    """How far the rule's twin is off in bfloat16; None if it is wrong in float32, or does not fit the class."""
    ours = copy.deepcopy(model)
    ours.config._attn_implementation = attention or model.config._attn_implementation
    _make_fast(ours, done)
    modules = [module for module in ours.modules() if type(module) is cls]
    try:
        if not modules or any(rule.fast.why_not(module) for module in modules):
            return None
        _make_fast(ours, {cls: rule.fast})
        if not all(_same(_run(ours, name), values) for name, values in expected.items()):
            return None
        want, found = (_run(copy.deepcopy(x).bfloat16(), "rows") for x in (model, ours))
    except _MISFITS as error:
        log.debug("%s is no twin of %s: %s", rule.fast.__name__, cls.__name__, error)
        return None
    assert want is not None and found is not None
    return float((want[0].float() - found[0].float()).abs().max())


def _make_fast(model: nn.Module, fasts: dict[Any, Any]) -> None:
    for module in model.modules():
        known: Any = type(module)
        if known in fasts:
            module.__class__ = twin(known, fasts[known])


def tiny(config: Any) -> Any:
    """A configuration with the same flags, small in every size: a layer of each kind, at least two."""
    config = copy.deepcopy(config.get_text_config())
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    lists = {name: list(getattr(config, name)) for name in _LISTS if getattr(config, name, None)}
    kinds = list(zip(*lists.values(), strict=False))
    chosen = list(dict.fromkeys(kinds.index(kind) for kind in kinds)) or [0]
    chosen = chosen if len(chosen) > 1 else [chosen[0]] * 2
    values: dict[str, Any] = {name: [whole[i] for i in chosen] for name, whole in lists.items()}
    values |= {"num_hidden_layers": len(chosen), "num_nextn_predict_layers": 0, "pad_token_id": 0}
    most = {name: size for size, names in _MOST.items() for name in names.split()}
    values |= {
        name: min(size, value) for name, size in most.items() if isinstance(value := getattr(config, name, None), int)
    }
    if heads and kv_heads:
        values |= {"num_key_value_heads": min(kv_heads, 4 if kv_heads == heads else 2)}
    for name, value in values.items():
        derived = isinstance(getattr(type(config), name, None), property)  # from other keys
        if hasattr(config, name) and not derived:
            setattr(config, name, value)
    return config


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Weights that make routing far from uniform, and no bias or norm neutral."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(noise * 0.2 if weight.ndim > 1 else weight + noise * 0.1)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)


def _run(model: Any, name: str) -> tuple[torch.Tensor, ...] | None:
    """Logits and all gradients; None if this model refuses the case, as some do packed rows."""
    ids = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": name == "cached"}
    if name == "padded":
        seen[0, :4] = 0
        inputs["attention_mask"] = seen
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
    logits = out.logits * seen[..., None]  # what is computed at padding is nobody's business
    logits.float().square().mean().backward()
    grads = (torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())
    return logits.detach(), *grads


def _same(found: tuple[torch.Tensor, ...] | None, wanted: tuple[torch.Tensor, ...]) -> bool:
    return found is not None and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-6)
        for a, b in zip(found, wanted, strict=True)
    )
