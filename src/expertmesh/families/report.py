"""Which fusions of a model are on: modules become instances of their twins, and a report says by what, or why not."""

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

#: Every fusion by its switch, and how modules show that it is meant for them: the end of their class' name in
#: Transformers or, behind a dot, an attribute.
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
#: the reason why a fusion is off in a model that has nothing of the kind
NOT_NEEDED = "no module of the model needs it"
_HEAD = "linear_cross_entropy"
_FUSION_OF = {rule.fast: rule.fusion for rule in RULES}


def switched_on(fused: bool | dict[str, bool]) -> frozenset[str]:
    """The fusions that `fused` asks for, as in `expertmesh.fuse`. Raises ValueError for an unknown switch."""
    switches = fused if isinstance(fused, dict) else {}
    for name in switches:
        if name not in FUSIONS:
            nearest = get_close_matches(name, FUSIONS, 1, 0)[0]
            raise ValueError(f"There is no fusion {name!r}; did you mean {nearest!r}? Known: {', '.join(FUSIONS)}.")
    return frozenset(name for name in FUSIONS if switches.get(name, True))


@dataclass(frozen=True)
class Fusion:
    """One row of a model's report: a fusion is on for `count` modules by `by`; where it is off, because of `reason`.

    verified: how it is known that modules compute the same: "table", of code known to be right, or "probe"; "" if off.
    """

    name: str
    on: bool = False
    by: str = ""
    reason: str = ""
    count: int = 0
    verified: str = ""


def _on(name: str, reason: str = "", verified: str = "table") -> Fusion:
    own = "Triton" if backends.HAS_TRITON else "PyTorch (no Triton here)"
    on_gpu = torch.cuda.is_available()
    by = ", ".join(filter(None, [backends.library_of(name), own])) if on_gpu else "PyTorch (no GPU here)"
    return Fusion(name, True, by, reason, verified=verified)


def apply_fusions(model: Any, requested: frozenset[str]) -> list[Fusion]:
    """Make the modules of a model fast, as far as it is `requested`, and report on it."""
    rows = [_experts(model)]
    for name in dict.fromkeys(rule.fusion for rule in RULES):
        rows.append(_apply(model, name) if name in requested else Fusion(name, reason="switched off"))
    return [*rows, fuse_head(model) if _HEAD in requested else Fusion(_HEAD, reason="switched off")]


def _apply(model: Any, fusion: str) -> Fusion:
    """Make the modules fast that this fusion is for."""
    kinds: dict[Any, nn.Module] = {type(module): module for module in model.modules() if not isinstance(module, Fast)}
    reasons: dict[str, None] = {}
    verified: list[str] = []  # of each module that is fast now
    for cls, one in kinds.items():
        rule, how = _rule_for(model, one, fusion)
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
        fasts = [getattr(module, "__fast__", None) for module in model.modules() if _is_meant(module, fusion)]
        others = dict.fromkeys(_FUSION_OF[fast] for fast in fasts if fast in _FUSION_OF)
        reasons[" beside ".join([NOT_NEEDED, *others])] = None
    return Fusion(fusion, reason="; ".join(reasons))


def _rule_for(model: Any, module: nn.Module, fusion: str) -> tuple[Rule | None, str]:
    """The rule for modules of this class and what proves it ("table", "probe"); or None and the reason, "" where the
    fusion is not meant for them."""
    cls, meant = type(module), _is_meant(module, fusion)
    if not cls.__module__.startswith("transformers.models."):
        return None, f"{cls.__name__} is no class of Transformers" if meant else ""
    rules = [rule for rule in RULES if rule.fusion == fusion]
    known = next((rule for rule in rules if rule.matches(cls)), None)
    if known is not None:
        return known, "table"
    if not meant:
        return None, ""
    done = {m.__stock__: m.__fast__ for m in model.modules() if getattr(m, "__fast__", None) in _FUSION_OF}
    asked = {}
    for rule in rules:
        with suppress(AttributeError):  # the class has other parts
            if rule.fast.probed and rule.fast.why_not(module) is None:
                asked[rule.fast] = rule
    proven = asked and probe(type(model).__stock__, model.config, cls, list(asked.values()), done)
    return (proven, "probe") if proven else (None, f"{cls.__name__} runs code of its own")


def _is_meant(module: nn.Module, fusion: str) -> bool:
    name, _, part = FUSIONS[fusion].partition(".")
    meant = hasattr(module, part) if part else type(module).__name__.endswith(name)
    return meant and not hasattr(module, "experts")  # a GptOssMLP is a block of them


def fuse_head(model: Any) -> Fusion:
    """Make the output embedding of a model defer its logits."""
    head, fast = model.get_output_embeddings(), twin(nn.Linear, FastHead)
    if type(head) not in (nn.Linear, fast):
        kind = "an output embedding" if head is None else f"nn.Linear as its head, but a {type(head).__name__}"
        return Fusion(_HEAD, reason=f"the model has no {kind}")
    head.__class__ = fast
    return _on(_HEAD)


def _experts(model: Any) -> Fusion:
    chosen = model.config.get_text_config()._experts_implementation
    if chosen != fast_experts.NAME:
        return Fusion("experts", reason=f"experts_implementation={chosen!r} was asked for")
    modules = filter(fast_experts.is_experts, model.modules())
    if reasons := {reason for m in modules if (reason := fast_experts.why_not(m)) is not None}:
        return Fusion("experts", reason=f"Transformers' grouped_mm runs: {'; '.join(sorted(reasons))}")
    return _on("experts")


def count_of(fusion: str, model: nn.Module) -> int:
    """For how many modules of a model a fusion is on."""
    if fusion == "experts":
        return sum(map(fast_experts.is_experts, model.modules()))
    fasts = {fast for fast, name in _FUSION_OF.items() if name == fusion} or {FastHead}
    return sum(getattr(module, "__fast__", None) in fasts for module in model.modules())


_printed: set[str] = set()


def print_report(model: nn.Module, rows: list[Fusion]) -> None:
    """Print what is on and what is off, once for each kind of model in a process."""
    lines = [f"expertmesh: {type(model).__name__}"]
    for row in rows:
        proven = ", verified by probe" if row.verified == "probe" else ""
        state, but = (f"on   {row.by} x{row.count}{proven}", "not everywhere: ") if row.on else ("off", "")
        lines.append(f"  {row.name:<21}{state}" + (f"  ({but}{row.reason})" if row.reason else ""))
    if (report := "\n".join(lines)) not in _printed:
        _printed.add(report)
        backends.logger().info(report)
