"""Which fusions of a model are on: modules become instances of their twins, and a report says by what, or why not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expertmesh import backends
from expertmesh.families.generic import RULES
from expertmesh.families.probe import probe
from expertmesh.families.rules import Rule
from expertmesh.layers.base_model import keeps_state
from expertmesh.layers.head import FastHead, why_not_head
from expertmesh.moe import experts as fast_experts
from expertmesh.twins import Fast, twin

#: Every fusion by its switch, and how Transformers names the classes it is meant for.
FUSIONS = {
    "experts": "Experts",
    "router": "Router",
    "rms_norm": "RMSNorm",
    "swiglu": "MLP",
    "mla_rope": "latent attention",
    "qk_norm_rope": "Attention",
    "rope": "Attention",
    "sink_attention": "attention with sinks",
    "add_norm": "DecoderLayer",
    "mamba2": "Mamba2Mixer",
    "linear_cross_entropy": "lm_head",
    "liger": "models without experts",
}
#: by what a module shows that such a fusion is meant for it, where its name does not
_PARTS = {"mla_rope": "kv_a_proj_with_mqa", "sink_attention": "sinks"}
#: the reason why a fusion is off in a model that has nothing of the kind
NOT_NEEDED = "no module of the model needs it"
_HEAD = "linear_cross_entropy"


@dataclass(frozen=True)
class Fusion:
    """One row of a model's report: a fusion is on for `count` modules by `by`; where it is off, because of `reason`.

    verified: how it is known that modules compute the same: "table", of code known to be right, or "probe"; "" if off.
    """

    name: str
    on: bool
    by: str
    reason: str
    count: int
    verified: str = ""


def apply_fusions(model: Any, requested: frozenset[str]) -> list[Fusion]:
    """Make the modules of a model fast, as far as it is `requested`, and report on it."""
    done: dict[type, Any] = {}
    rows, off = [experts_row(model)], {name: Fusion(name, False, "", "switched off", 0) for name in FUSIONS}
    for fusion in dict.fromkeys(rule.fusion for rule in RULES):
        rows.append(_apply(model, fusion, done) if fusion in requested else off[fusion])
    return [*rows, _fuse_head(model) if _HEAD in requested else off[_HEAD]]


def can_be_told(module: nn.Module) -> bool:
    """Whether a module can keep packed documents apart: not if it is a mixer with a state and has no twin."""
    known = isinstance(module, Fast) or any(rule.matches(type(module)) for rule in RULES if rule.fusion == "mamba2")
    return known or not keeps_state(module)


def _apply(model: Any, fusion: str, done: dict[type, Any]) -> Fusion:
    """Make modules fast that this fusion is for. done: classes that are fast already, and by which mixin."""
    rules = [rule for rule in RULES if rule.fusion == fusion]
    chosen: dict[type, tuple[Rule | None, str]] = {}
    reasons: dict[str, None] = {}
    verified: dict[str, int] = {}
    for module in list(model.modules()):
        cls: Any = type(module)
        if issubclass(cls, Fast):
            continue
        if cls not in chosen:
            chosen[cls] = _rule_for(model, module, fusion, rules, tuple(done.items()))
        rule, how = chosen[cls]
        reason = how if rule is None else rule.why_not(module)
        if reason:
            reasons[f"{cls.__name__}: {reason}" if rule is not None else reason] = None
        elif rule is not None:
            module.__class__ = twin(cls, rule.fast)
            done[cls] = rule.fast
            verified[how] = verified.get(how, 0) + 1
    if not verified and not reasons:
        meant = [module for module in model.modules() if _is_meant(module, fusion)]
        others = [name for name in dict.fromkeys(rule.fusion for rule in RULES) if count_of(name, meant)]
        reasons[" beside ".join([NOT_NEEDED, *others])] = None
    by, how = (_how(fusion), "probe" if "probe" in verified else "table") if verified else ("", "")
    return Fusion(fusion, bool(verified), by, "; ".join(reasons), sum(verified.values()), how)


def _rule_for(model: Any, module: nn.Module, fusion: str, rules: list[Rule], done: Any) -> tuple[Rule | None, str]:
    """The rule for modules of this class and how it is known to hold; else None and the reason, "" if it needs none."""
    cls = type(module)
    if not cls.__module__.startswith("transformers.models."):
        return None, f"{cls.__name__} is no class of Transformers" if _is_meant(module, fusion) else ""
    known = next((rule for rule in rules if rule.matches(cls)), None)
    if known is not None:
        return known, "table"
    if not _is_meant(module, fusion):
        return None, ""
    asked = [rule for rule in rules if rule.probed and _may_fit(rule, module)]
    proven = probe(type(model).__stock__, model.config, cls, asked, done) if asked else None
    return (proven, "probe") if proven is not None else (None, f"{cls.__name__} runs code of its own")


def _is_meant(module: nn.Module, fusion: str) -> bool:
    part = _PARTS.get(fusion)
    meant = type(module).__name__.endswith(FUSIONS[fusion]) if part is None else hasattr(module, part)
    return meant and not hasattr(module, "experts")  # a GptOssMLP is a block of them


def _may_fit(rule: Rule, module: nn.Module) -> bool:
    try:
        return rule.why_not(module) is None
    except AttributeError:
        return False


def _fuse_head(model: Any) -> Fusion:
    head = model.get_output_embeddings()
    if (reason := why_not_head(head)) is not None:
        return Fusion(_HEAD, False, "", reason, 0)
    head.__class__ = twin(nn.Linear, FastHead)
    return Fusion(_HEAD, True, _how(_HEAD), "", 1, "table")


def experts_row(model: Any) -> Fusion:
    """Whether experts run on our backend."""
    modules = [m for m in model.modules() if fast_experts.is_experts(m)]
    chosen = model.config.get_text_config()._experts_implementation
    if chosen != fast_experts.NAME:
        return Fusion("experts", False, "", f"experts_implementation={chosen!r} was asked for", 0)
    reasons = {reason for m in modules if (reason := fast_experts.why_not(m)) is not None}
    if reasons:
        return Fusion("experts", False, "", f"Transformers' grouped_mm runs: {'; '.join(sorted(reasons))}", 0)
    return Fusion("experts", True, _how("experts"), "", len(modules), "table")


def _how(fusion: str) -> str:
    if not torch.cuda.is_available():
        return "PyTorch (no GPU here)"
    own = "Triton" if backends.HAS_TRITON else "PyTorch (no Triton here)"
    return ", ".join(filter(None, [backends.library_of(fusion), own]))


def count_of(fusion: str, modules: list[nn.Module]) -> int:
    """For how many of these modules a fusion is on."""
    if fusion == "experts":
        return sum(map(fast_experts.is_experts, modules))
    return sum(isinstance(m, tuple(rule.fast for rule in RULES if rule.fusion == fusion)) for m in modules)


_printed: set[tuple] = set()


def print_report(model: nn.Module, rows: list[Fusion]) -> None:
    """Print what is on and what is off, once for each kind of model in a process."""
    key = (type(model).__name__, *rows)
    if key in _printed:
        return
    _printed.add(key)
    lines = [f"expertmesh: {type(model).__name__}"]
    for row in rows:
        proven = ", verified by probe" if row.verified == "probe" else ""
        state, but = (f"on   {row.by} x{row.count}{proven}", "not everywhere: ") if row.on else ("off", "")
        lines.append(f"  {row.name:<21}{state}" + (f"  ({but}{row.reason})" if row.reason else ""))
    backends.logger().info("\n".join(lines))
