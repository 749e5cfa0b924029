"""Read LoRA adapters in all known layouts, as low-rank updates of the base model's parameters.

Tools write adapters of experts in different layouts. Reading one layout as another merges or serves noise
(unsloth#6930, vllm#41384, sglang#25528). With E experts, rank r, and weights [out, in]:

PEFT (`target_parameters`)  one pair for all experts: A [E·r, in], B [out, r·E]; E is the slower dimension in A, the
                            faster one in B
expert-major                the same names and shapes, but E is the slower dimension in B: Unsloth until September 2026
before PEFT 0.19.1          A of `out` and B of `in`: the factors of the transposed weight
per expert                  `experts.3.gate_proj`, `.up_proj`, `.down_proj` or `.w1`, `.w3`, `.w2`: read by vLLM and
                            SGLang, and written for Transformers 4; `gate_up_projs.3`: GPT-OSS in 4 bits

PEFT names a pair for all experts after the module, not the parameter. The last adapted parameter of the module has
`experts.lora_A`, the one before it `experts.base_layer.lora_A`.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from expertmesh.adapters.files import CONFIG, Adapter, AdapterError, Change, read_config, read_tensors
from expertmesh.moe.experts import is_experts

RANK_MAJOR, EXPERT_MAJOR = "rank-major", "expert-major"
#: values of `lora_B_layout` in adapter_config.json, which Unsloth writes since September 2026
RECORDED = {"rank_major": RANK_MAJOR, "grouped_by_expert": EXPERT_MAJOR}
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<e>\d+)\.(?P<part>\w+)")
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?")


def skeleton(config: Any) -> PreTrainedModel:
    """Return the stock model of a configuration, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_adapter(folder: str | Path, model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """Read an adapter for a base model, which may be on the meta device (`skeleton`).

    layout: `rank-major` or `expert-major`, if the files do not record the layout of a B for all experts. Raises
    AdapterError if files are missing or damaged, if a tensor does not fit the model, or if the layout is ambiguous.
    """
    adapter = Adapter(Path(folder), read_config(Path(folder)))
    reader = _Reader(adapter, model, layout)
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in read_tensors(adapter.folder).items():
        path = key.removeprefix("base_model.model.")
        if factor := _FACTOR.fullmatch(path):
            pairs[factor["path"]][factor["factor"]] = value
        else:
            reader.add_replaced(key, path, value)
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(
                f"{folder} has lora_{next(iter(pair))} of {path} alone: it was cut short. Copy it again."
            )
        reader.add(path, pair["A"], pair["B"])
    reader.finish()
    return adapter


class _Reader:
    def __init__(self, adapter: Adapter, model: PreTrainedModel, layout: str | None):
        self.adapter, self.config, self.layout = adapter, adapter.config, layout
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        self.per_expert: dict[tuple[str, str], dict[int, tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(dict)
        self.tied = model.config.get_text_config().tie_word_embeddings
        self.tied_ids = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}

    def add_replaced(self, key: str, path: str, value: torch.Tensor) -> None:
        """Add a tensor that is saved whole."""
        path = path.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        name = path if path in self.parameters else apply_renamings(path, self.renamings)
        if name not in self.parameters:
            raise self.error(f"{key} is neither lora_A, lora_B nor a parameter of the base")
        self.check_shape(key, value, tuple(self.parameters[name].shape))
        if not key.endswith(".base_layer.weight"):  # PEFT saves the base's embeddings with their adapters
            self.refuse_tied(name)
            self.adapter.replaced[name] = value

    def add(self, path: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add a pair of factors."""
        plain = re.sub(r"(\.base_layer)+$", "", path)
        module = next((p for p in (plain, self.renamed(plain)) if p in self.modules), None)
        if module is not None and not isinstance(self.modules[module], nn.Linear | nn.Embedding):
            return self.add_module_pair(path, module, path.count(".base_layer"), A, B)
        if module is not None:
            name, transposed = f"{module}.weight", isinstance(self.modules[module], nn.Embedding)
            return self.add_change(path, name if self.is_target(name) else module, name, A, B, transposed)
        parent, _, leaf = plain.rpartition(".")
        name = f"{parent if parent in self.modules else self.renamed(parent)}.{leaf}"
        if name in self.parameters:  # the pair is named after its parameter
            return self.add_change(path, name, name, A, B)
        self.add_expert_pair(path, plain, A, B)

    def renamed(self, path: str) -> str:
        return apply_renamings(f"{path}.weight", self.renamings).removesuffix(".weight")

    def add_module_pair(self, path: str, module: str, depth: int, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add a pair that PEFT named after the module. depth: the number of `.base_layer` in its name."""
        names = [f"{module}.{name}" for name, _ in self.modules[module].named_parameters(recurse=False)]
        names = list(filter(self.is_target, names))
        if not names and not depth and f"{module}.weight" in self.parameters:  # a router that was a Linear when trained
            return self.add_change(path, module, f"{module}.weight", A, B)
        if depth >= len(names):
            raise self.error(
                f"{path} belongs to one of the parameters of {module}, but target_parameters in {CONFIG} "
                f"names {len(names)} of them"
            )
        name = names[len(names) - 1 - depth]
        self.add_change(path, name, name, A, B)

    def is_target(self, name: str) -> bool:
        targets = self.config.get("target_parameters") or ()
        return name in targets or any(name.endswith(f".{target}") for target in targets)

    def add_change(
        self, path: str, key: str, name: str, A: torch.Tensor, B: torch.Tensor, transposed: bool = False
    ) -> None:
        """Add a pair for a whole parameter: a matrix, or the stacked matrices of all experts."""
        shape = tuple(self.parameters[name].shape)
        if len(shape) == 2:
            out, into = shape[::-1] if transposed else shape
            r, scaling = self.rank_and_scaling(path, key)
            self.check_shape(f"lora_A of {path}", A, (r, into))
            self.check_shape(f"lora_B of {path}", B, (out, r))
            change = Change(A, B, scaling, transposed=transposed)
        elif len(shape) == 3:
            change = self.stacked_change(path, key, name, A, B)
        else:
            raise self.error(f"{path} is an adapter for {name} of {len(shape)} dimensions")
        self.refuse_tied(name)
        self.adapter.changes.setdefault(name, []).append(change)

    def stacked_change(self, path: str, key: str, name: str, A: torch.Tensor, B: torch.Tensor) -> Change:
        """Return the change of a pair for all experts, in PEFT's layouts, or as SGLang's [E, r, in] and [E, out, r]."""
        E, first, second = self.parameters[name].shape
        transposed = bool(getattr(self.modules[name.rpartition(".")[0]], "is_transposed", False))
        out, into = (second, first) if transposed else (first, second)
        r, scaling = self.rank_and_scaling(path, key)
        if A.ndim == 3:
            self.check_shape(f"lora_A of {path}", A, (E, r, into))
            self.check_shape(f"lora_B of {path}", B, (E, out, r))
            self.set_layout("per expert, in one tensor", native=False)
            return Change(A, B, scaling, transposed=transposed)
        swapped = self.is_swapped(path, A, B, (E * r, into), (out, r * E)) if not transposed else False
        if swapped:
            into, out = out, into
        self.check_shape(f"lora_A of {path}", A, (E * r, into))
        self.check_shape(f"lora_B of {path}", B, (out, r * E))
        A = A.reshape(E, r, into)
        if self.layout_of_B(path, E, r) == EXPERT_MAJOR:
            B = B.reshape(out, E, r).transpose(0, 1)
            self.set_layout(EXPERT_MAJOR, native=False)
        else:
            B = B.reshape(out, r, E).permute(2, 0, 1)
            self.set_layout(RANK_MAJOR, native=not swapped)
        return (
            Change(B.transpose(1, 2), A.transpose(1, 2), scaling)
            if swapped
            else Change(A, B, scaling, transposed=transposed)
        )

    def is_swapped(self, path: str, A: torch.Tensor, B: torch.Tensor, a: tuple[int, int], b: tuple[int, int]) -> bool:
        """Whether the factors are of the transposed weight, as before PEFT 0.19.1. a, b: shapes if they are not."""
        if a[1] != b[0]:
            return (A.shape[-1], B.shape[0]) == (b[0], a[1])
        try:
            return Version(self.config["peft_version"].partition("@")[0]) < Version("0.19.1")
        except (KeyError, AttributeError, InvalidVersion):
            raise self.error(
                f"{path} is for square weights, which PEFT transposed before 0.19.1, and {CONFIG} has no readable "
                f"peft_version. Write the version that made it there"
            ) from None

    def layout_of_B(self, path: str, E: int, r: int) -> str:
        """Return the layout of a B for all experts. Both layouts have the same names and shapes."""
        recorded = self.config.get("lora_B_layout")
        if recorded is not None and recorded not in RECORDED:
            raise self.error(f"{CONFIG} says lora_B_layout={recorded!r}, which is unknown")
        layout = RECORDED.get(recorded or "", self.layout)
        if self.layout not in (None, layout):
            raise self.error(f"{CONFIG} says that lora_B is {layout}, and you say {self.layout}. Leave out --layout")
        if layout is not None or 1 in (E, r):
            return layout or RANK_MAJOR
        card = self.adapter.folder / "README.md"
        texts = json.dumps(self.config), card.read_text(errors="replace") if card.is_file() else ""
        if any("unsloth" in text.lower() for text in texts):
            raise self.error(
                f"the layout of lora_B of {path} cannot be told: Unsloth wrote it expert-major until September 2026, "
                f"since then rank-major as PEFT does, and {CONFIG} has no lora_B_layout. Say which with --layout, and "
                f"try both if you do not know: the wrong one gives noise"
            )
        return RANK_MAJOR

    def add_expert_pair(self, path: str, plain: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Add a pair for one expert."""
        r, scaling = self.rank_and_scaling(path, plain)
        if found := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_projs\.(\d+)", plain):  # GPT-OSS in 4 bits
            module, part, e = found[1], {"gate_up": "all", "down": "down"}[found[2]], int(found[3])
        elif found := _EXPERT.fullmatch(plain):
            module, part, e = found["experts"], PARTS.get(found["part"], ""), int(found["e"])
        else:
            raise self.error(f"the base has no module {plain}")
        module = module if module in self.modules else self.renamed(f"{module}.0.x").removesuffix(".0.x")
        if not is_experts(self.modules.get(module)) or not part:
            raise self.error(f"{path} is in no known layout of adapters")
        if e >= self.modules[module].num_experts:
            raise self.error(f"{path} is of expert {e}, and {module} has {self.modules[module].num_experts}")
        for factor, value, shape in (("A", A, (r, A.shape[-1])), ("B", B, (B.shape[0], r))):
            self.check_shape(f"lora_{factor} of {path}", value, shape)
        self.per_expert[module, part][e] = A, B, scaling

    def finish(self) -> None:
        """Stack the pairs of single experts. Experts without a pair get zeros."""
        for (path, part), pairs in self.per_expert.items():
            experts = self.modules[path]
            name, rows = locate_projection(experts, part)
            E, *shape = self.parameters[f"{path}.{name}"].shape
            transposed = bool(experts.is_transposed)
            out, into = shape[::-1] if transposed else shape
            out = len(range(out)[rows])
            r, scaling = max(A.shape[0] for A, *_ in pairs.values()), 1.0
            As, Bs = torch.zeros(E, r, into), torch.zeros(E, out, r)
            scalings = {pair[2] for pair in pairs.values()}
            if len(scalings) == 1:
                (scaling,) = scalings
            for e, (A, B, trained) in pairs.items():
                self.check_shape(f"lora_A of {path}.{e}, {part},", A, (A.shape[0], into))
                self.check_shape(f"lora_B of {path}.{e}, {part},", B, (out, B.shape[1]))
                As[e, : A.shape[0]], Bs[e, :, : B.shape[1]] = A, B * (trained / scaling)
            dtype = next(iter(pairs.values()))[0].dtype
            change = Change(As.to(dtype), Bs.to(dtype), scaling, rows, transposed)
            self.adapter.changes.setdefault(f"{path}.{name}", []).append(change)
            self.set_layout("per expert", native=False)

    def rank_and_scaling(self, path: str, key: str) -> tuple[int, float]:
        """Return (r, scaling) of a pair for the module or parameter `key`, by PEFT's rules for patterns."""

        def pattern(name: str, default: float) -> float:
            matches = (v for k, v in (self.config.get(name) or {}).items() if re.match(rf"(.*\.)?({k})$", key))
            return next(matches, default)

        r, alpha = int(pattern("rank_pattern", self.config["r"])), pattern("alpha_pattern", self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        self.adapter.pairs[path] = r, scaling
        return r, scaling

    def check_shape(self, what: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise self.error(
                f"{what} has the shape {tuple(value.shape)}, where its base and rank ask for {shape}. It is another "
                f"model's adapter, or {CONFIG} is another adapter's (r, rank_pattern)"
            )

    def refuse_tied(self, name: str) -> None:
        if self.tied and id(self.parameters[name]) in self.tied_ids:
            raise self.error(
                f"it changes {name}, which the base ties to its other end: merged, the change would count at both. "
                f"Untie the base first (tie_word_embeddings=false, and save it)"
            )

    def set_layout(self, layout: str, native: bool) -> None:
        self.adapter.layout, self.adapter.native = layout, self.adapter.native and native

    def error(self, why: str) -> AdapterError:
        return AdapterError(f"The adapter in {self.adapter.folder} cannot be read: {why}.")


def locate_projection(experts: Any, part: str) -> tuple[str, slice]:
    """Return (parameter name, rows) of the projection `gate`, `up`, `down`, or `all` (gate and up) of experts. For
    experts without a gate, `gate` is the up-projection, because SGLang names it so."""
    if part == "down" or not experts.has_gate:
        return "down_proj" if part == "down" else "up_proj", slice(None)
    if part == "all":
        return "gate_up_proj", slice(None)
    second = part == "up"
    if not experts.is_concatenated:
        return "gate_up_proj", slice(int(second), None, 2)
    half = experts.gate_up_proj.shape[2 if experts.is_transposed else 1] // 2
    return "gate_up_proj", slice(half, None) if second else slice(0, half)
