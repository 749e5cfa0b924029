"""Apply fusions to a model: convert modules to their twins, and report which fusions are on and why others are off."""

from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from expertmesh import backends
from expertmesh.families.probe import probe
from expertmesh.families.table import RULES, Rule
from expertmesh.layers.head import FastHead
from expertmesh.moe import experts as fast_experts
from expertmesh.twins import Fast, twin

#: {fusion: modules it applies to}, given by the suffix of their class' name in Transformers or by ".attribute"
FUSIONS = {
    "experts": "Experts",
    "router": "Router",
    "rms_norm": "RMSNorm",
    "swiglu": "MLP",
    "mla_rope": ".kv_a_proj_with_mqa",
    "qk_norm_rope": "Attention",
    "rope": "Attention",
    "sink_attention": ".sinks",
    "add_norm": "DecoderLayer",
    "mamba2": "Mamba2Mixer",
    "linear_cross_entropy": "lm_head",
}
#: the reason if a model has no module for a fusion
NOT_NEEDED = "no module of the model needs it"
_HEAD = "linear_cross_entropy"
_FUSION_OF = {rule.fast: rule.fusion for rule in RULES}


def switched_on(fused: bool | dict[str, bool]) -> frozenset[str]:
    """Return the fusions that `fused`, as in `expertmesh.fuse`, enables. Raises ValueError for an unknown name."""
    switches = fused if isinstance(fused, dict) else {}
    for name in switches:
        if name not in FUSIONS:
            nearest = get_close_matches(name, FUSIONS, 1, 0)[0]
            raise ValueError(f"There is no fusion {name!r}; did you mean {nearest!r}? Known: {', '.join(FUSIONS)}.")
    return frozenset(name for name in FUSIONS if switches.get(name, True))


@dataclass(frozen=True)
class Fusion:
    """One row of a model's report.

    by: the libraries that run it. reason: why it is off, for all or for some modules. count: number of fused modules.
    verified: what proves that results are the same: "table" (a known fingerprint) or "probe"; "" if off.
    """

    name: str
    on: bool = False
    by: str = ""
    reason: str = ""
    count: int = 0
    verified: str = ""


def _on(name: str, reason: str = "", verified: str = "table") -> Fusion:
    base = "Triton" if backends.HAS_TRITON else "PyTorch (no Triton here)"
    on_gpu = torch.cuda.is_available()
    by = ", ".join(filter(None, [backends.library_of(name), base])) if on_gpu else "PyTorch (no GPU here)"
    return Fusion(name, True, by, reason, verified=verified)


def apply_fusions(model: Any, requested: frozenset[str]) -> list[Fusion]:
    """Apply the requested fusions to a model in place and return the report."""
    rows = [_experts(model)]
    for name in dict.fromkeys(rule.fusion for rule in RULES):
        rows.append(_apply(model, name) if name in requested else Fusion(name, reason="switched off"))
    return [*rows, fuse_head(model) if _HEAD in requested else Fusion(_HEAD, reason="switched off")]


def _apply(model: Any, fusion: str) -> Fusion:
    """Convert the modules of this fusion to their twins."""
    kinds: dict[Any, nn.Module] = {type(module): module for module in model.modules() if not isinstance(module, Fast)}
    reasons: dict[str, None] = {}
    verified: list[str] = []  # one entry per converted module
    for cls, example in kinds.items():
        rule, how = _rule_for(model, example, fusion)
        if rule is None:
            reasons |= {how: None} if how else {}
            continue
        for module in [module for module in model.modules() if type(module) is cls]:
            if (reason := rule.fast.why_not(module)) is not None:
                reasons[f"{cls.__name__}: {reason}"] = None
            else:
                module.__class__ = twin(cls, rule.fast)
                verified.append(how)
    if verified:
        return _on(fusion, "; ".join(reasons), max(verified, key=("table", "probe").index))
    if not reasons:
        fasts = [getattr(module, "__fast__", None) for module in model.modules() if _applies(module, fusion)]
        others = dict.fromkeys(_FUSION_OF[fast] for fast in fasts if fast in _FUSION_OF)
        reasons[" in addition to ".join([NOT_NEEDED, *others])] = None
    return Fusion(fusion, reason="; ".join(reasons))


def _rule_for(model: Any, module: nn.Module, fusion: str) -> tuple[Rule | None, str]:
    """Return the rule for this module's class and what proves it ("table" or "probe"); or None and the reason, which
    is "" if the fusion does not apply to such modules."""
    cls, applies = type(module), _applies(module, fusion)
    if not cls.__module__.startswith("transformers.models."):
        return None, f"{cls.__name__} is not a class of Transformers" if applies else ""
    rules = [rule for rule in RULES if rule.fusion == fusion]
    match = next((rule for rule in rules if rule.matches(cls)), None)
    if match is not None:
        return match, "table"
    if not applies:
        return None, ""
    fused = {m.__stock__: m.__fast__ for m in model.modules() if getattr(m, "__fast__", None) in _FUSION_OF}
    candidates = {}
    for rule in rules:
        with suppress(AttributeError):  # the class lacks an attribute
            if rule.fast.probed and rule.fast.why_not(module) is None:
                candidates[rule.fast] = rule
    proven = candidates and probe(type(model).__stock__, model.config, cls, list(candidates.values()), fused)
    return (proven, "probe") if proven else (None, f"{cls.__name__} runs code of its own")


def _applies(module: nn.Module, fusion: str) -> bool:
    name, _, part = FUSIONS[fusion].partition(".")
    applies = hasattr(module, part) if part else type(module).__name__.endswith(name)
    return applies and not hasattr(module, "experts")  # a GptOssMLP is an MoE block


def fuse_head(model: Any) -> Fusion:
    """Make the output embedding of a model a `FastHead`, which defers logits, and report on it."""
    head, fast = model.get_output_embeddings(), twin(nn.Linear, FastHead)
    if type(head) not in (nn.Linear, fast):
        kind = "an output embedding" if head is None else f"nn.Linear as its head, but a {type(head).__name__}"
        return Fusion(_HEAD, reason=f"the model has no {kind}")
    head.__class__ = fast
    return _on(_HEAD)


def _experts(model: Any) -> Fusion:
    chosen = model.config.get_text_config()._experts_implementation
    if chosen != fast_experts.NAME:
        return Fusion("experts", reason=f"experts_implementation={chosen!r} is configured")
    modules = filter(fast_experts.is_experts, model.modules())
    if reasons := {reason for m in modules if (reason := fast_experts.why_not(m)) is not None}:
        return Fusion("experts", reason=f"Transformers' grouped_mm runs: {'; '.join(sorted(reasons))}")
    return _on("experts")


def count_of(fusion: str, model: nn.Module) -> int:
    """Return the number of modules of a model that a fusion is on for."""
    if fusion == "experts":
        return sum(map(fast_experts.is_experts, model.modules()))
    fasts = {fast for fast, name in _FUSION_OF.items() if name == fusion} or {FastHead}
    return sum(getattr(module, "__fast__", None) in fasts for module in model.modules())


_logged: set[str] = set()


def print_report(model: nn.Module, rows: list[Fusion]) -> None:
    """Log the report, but the same text only once per process."""
    lines = [f"expertmesh: {type(model).__name__}"]
    for row in rows:
        proven = ", verified by probe" if row.verified == "probe" else ""
        state, prefix = (f"on   {row.by} x{row.count}{proven}", "not everywhere: ") if row.on else ("off", "")
        lines.append(f"  {row.name:<21}{state}" + (f"  ({prefix}{row.reason})" if row.reason else ""))
    if (report := "\n".join(lines)) not in _logged:
        _logged.add(report)
        backends.logger().info(report)
