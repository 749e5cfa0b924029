"""LoRA adapters on disk, read as what they change: low-rank products of parameters, by the names in the base model.

Tools write adapters of experts in layouts of their own, and what reads one layout as another merges or serves noise
(unsloth#6930, vllm#41384, sglang#25528). E experts, rank r, weights [out, in]:

PEFT (`target_parameters`)  one pair for all experts: A [E·r, in], the expert slowest; B [out, r·E], the expert fastest
expert-major                the same names and shapes, in B the expert slowest, as Unsloth wrote until September 2026
before PEFT 0.19.1          A of `out` and B of `in`: the factors of the transposed weight
per expert                  `experts.3.gate_proj`, `.up_proj`, `.down_proj` or `.w1`, `.w3`, `.w2`: what vLLM and SGLang
                            read, and what tools write for Transformers 4; `gate_up_projs.3`: GPT-OSS in 4 bits

PEFT names such a pair after the module, not after the parameter: of the parameters it was put on, the last has
`experts.lora_A`, the one before `experts.base_layer.lora_A`.
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
#: how `lora_B_layout`, which Unsloth records since September 2026, calls the two
RECORDED = {"rank_major": RANK_MAJOR, "grouped_by_expert": EXPERT_MAJOR}
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<e>\d+)\.(?P<part>\w+)")
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?")


def skeleton(config: Any) -> PreTrainedModel:
    """The stock model of a configuration, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_adapter(folder: str | Path, model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """Read an adapter for a base model, of which only names and shapes are used (`skeleton`).

    layout: `rank-major` or `expert-major` of one B for all experts, where the folder does not tell. Raises AdapterError
    if files are missing or damaged, if a tensor has no place in the model or another shape, or if the layout cannot be
    told.
    """
    adapter = Adapter(Path(folder), read_config(Path(folder)))
    reader = _Reader(adapter, model, layout)
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in read_tensors(adapter.folder).items():
        path = key.removeprefix("base_model.model.")
        if factor := _FACTOR.fullmatch(path):
            pairs[factor["path"]][factor["factor"]] = value
        else:
            reader.replace(key, path, value)
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
        self.of_tied = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}

    def replace(self, key: str, path: str, value: torch.Tensor) -> None:
        """A tensor that is saved whole."""
        path = path.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        name = path if path in self.parameters else apply_renamings(path, self.renamings)
        if name not in self.parameters:
            raise self.refused(f"{key} is neither lora_A, lora_B nor a parameter of the base")
        self.fits(key, value, tuple(self.parameters[name].shape))
        if not key.endswith(".base_layer.weight"):  # PEFT saves the base's embeddings beside their adapters
            self.checked(name)
            self.adapter.replaced[name] = value

    def add(self, path: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """One pair of factors."""
        plain = re.sub(r"(\.base_layer)+$", "", path)
        known = next((p for p in (plain, self.renamed(plain)) if p in self.modules), None)
        if known is not None and not isinstance(self.modules[known], nn.Linear | nn.Embedding):
            return self.of_parameter(path, known, path.count(".base_layer"), A, B)
        if known is not None:
            name, transposed = f"{known}.weight", isinstance(self.modules[known], nn.Embedding)
            return self.product(path, name if self.is_target(name) else known, name, A, B, transposed)
        parent, _, leaf = plain.rpartition(".")
        name = f"{parent if parent in self.modules else self.renamed(parent)}.{leaf}"
        if name in self.parameters:  # a pair named after its parameter
            return self.product(path, name, name, A, B)
        self.of_expert(path, plain, A, B)

    def renamed(self, path: str) -> str:
        return apply_renamings(f"{path}.weight", self.renamings).removesuffix(".weight")

    def of_parameter(self, path: str, module: str, depth: int, A: torch.Tensor, B: torch.Tensor) -> None:
        """A pair that PEFT named after the module and its depth in the wrappers."""
        names = [f"{module}.{name}" for name, _ in self.modules[module].named_parameters(recurse=False)]
        names = list(filter(self.is_target, names))
        if not names and not depth and f"{module}.weight" in self.parameters:  # a router, which was a Linear once
            return self.product(path, module, f"{module}.weight", A, B)
        if depth >= len(names):
            raise self.refused(
                f"{path} belongs to one of the parameters of {module}, but target_parameters in {CONFIG} "
                f"names {len(names)} of them"
            )
        name = names[len(names) - 1 - depth]
        self.product(path, name, name, A, B)

    def is_target(self, name: str) -> bool:
        targets = self.config.get("target_parameters") or ()
        return name in targets or any(name.endswith(f".{target}") for target in targets)

    def product(
        self, path: str, key: str, name: str, A: torch.Tensor, B: torch.Tensor, transposed: bool = False
    ) -> None:
        """A pair for a whole parameter: a matrix, or one for each expert."""
        shape = tuple(self.parameters[name].shape)
        if len(shape) == 2:
            out, into = shape[::-1] if transposed else shape
            r, scaling = self.rank_and_scaling(path, key)
            self.fits(f"lora_A of {path}", A, (r, into))
            self.fits(f"lora_B of {path}", B, (out, r))
            change = Change(A, B, scaling, transposed=transposed)
        elif len(shape) == 3:
            change = self.of_experts(path, key, name, A, B)
        else:
            raise self.refused(f"{path} is an adapter for {name} of {len(shape)} dimensions")
        self.checked(name)
        self.adapter.changes.setdefault(name, []).append(change)

    def of_experts(self, path: str, key: str, name: str, A: torch.Tensor, B: torch.Tensor) -> Change:
        """One pair for all experts, or already apart, as SGLang has it: [E, r, in] and [E, out, r]."""
        E, first, second = self.parameters[name].shape
        transposed = bool(getattr(self.modules[name.rpartition(".")[0]], "is_transposed", False))
        out, into = (second, first) if transposed else (first, second)
        r, scaling = self.rank_and_scaling(path, key)
        if A.ndim == 3:
            self.fits(f"lora_A of {path}", A, (E, r, into))
            self.fits(f"lora_B of {path}", B, (E, out, r))
            self.read_as("per expert, in one tensor", native=False)
            return Change(A, B, scaling, transposed=transposed)
        swapped = self.is_swapped(path, A, B, (E * r, into), (out, r * E)) if not transposed else False
        if swapped:
            into, out = out, into
        self.fits(f"lora_A of {path}", A, (E * r, into))
        self.fits(f"lora_B of {path}", B, (out, r * E))
        A = A.reshape(E, r, into)
        if self.layout_of_B(path, E, r) == EXPERT_MAJOR:
            B = B.reshape(out, E, r).transpose(0, 1)
            self.read_as(EXPERT_MAJOR, native=False)
        else:
            B = B.reshape(out, r, E).permute(2, 0, 1)
            self.read_as(RANK_MAJOR, native=not swapped)
        return (
            Change(B.transpose(1, 2), A.transpose(1, 2), scaling)
            if swapped
            else Change(A, B, scaling, transposed=transposed)
        )

    def is_swapped(self, path: str, A: torch.Tensor, B: torch.Tensor, a: tuple[int, int], b: tuple[int, int]) -> bool:
        """Whether the factors are those of the transposed weight, as PEFT had them before 0.19.1."""
        if a[1] != b[0]:
            return (A.shape[-1], B.shape[0]) == (b[0], a[1])
        try:
            return Version(self.config["peft_version"].partition("@")[0]) < Version("0.19.1")
        except (KeyError, AttributeError, InvalidVersion):
            raise self.refused(
                f"{path} is for square weights, which PEFT transposed before 0.19.1, and {CONFIG} has no readable "
                f"peft_version. Write the version that made it there"
            ) from None

    def layout_of_B(self, path: str, E: int, r: int) -> str:
        """How one B for all experts is laid out; both layouts have the same names and shapes."""
        recorded = self.config.get("lora_B_layout")
        if recorded is not None and recorded not in RECORDED:
            raise self.refused(f"{CONFIG} says lora_B_layout={recorded!r}, which is not known here")
        layout = RECORDED.get(recorded or "", self.layout)
        if self.layout not in (None, layout):
            raise self.refused(f"{CONFIG} says that lora_B is {layout}, and you say {self.layout}. Leave out --layout")
        if layout is not None or 1 in (E, r):
            return layout or RANK_MAJOR
        card = self.adapter.folder / "README.md"
        texts = json.dumps(self.config), card.read_text(errors="replace") if card.is_file() else ""
        if any("unsloth" in text.lower() for text in texts):
            raise self.refused(
                f"the layout of lora_B of {path} cannot be told: Unsloth wrote it expert-major until September 2026, "
                f"since then rank-major as PEFT does, and {CONFIG} has no lora_B_layout. Say which with --layout, and "
                f"try both if you do not know: the wrong one gives noise"
            )
        return RANK_MAJOR

    def of_expert(self, path: str, plain: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """A pair for one expert."""
        r, scaling = self.rank_and_scaling(path, plain)
        if found := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_projs\.(\d+)", plain):  # GPT-OSS in 4 bits
            module, part, e = found[1], {"gate_up": "all", "down": "down"}[found[2]], int(found[3])
        elif found := _EXPERT.fullmatch(plain):
            module, part, e = found["experts"], PARTS.get(found["part"], ""), int(found["e"])
        else:
            raise self.refused(f"the base has no module {plain}")
        module = module if module in self.modules else self.renamed(f"{module}.0.x").removesuffix(".0.x")
        if not is_experts(self.modules.get(module)) or not part:
            raise self.refused(f"{path} is in no layout of adapters that is known here")
        if e >= self.modules[module].num_experts:
            raise self.refused(f"{path} is of expert {e}, and {module} has {self.modules[module].num_experts}")
        for factor, value, shape in (("A", A, (r, A.shape[-1])), ("B", B, (B.shape[0], r))):
            self.fits(f"lora_{factor} of {path}", value, shape)
        self.per_expert[module, part][e] = A, B, scaling

    def finish(self) -> None:
        """Put the pairs of single experts together. Experts without any keep their weights."""
        for (path, part), pairs in self.per_expert.items():
            experts = self.modules[path]
            name, rows = place(experts, part)
            E, *shape = self.parameters[f"{path}.{name}"].shape
            transposed = bool(experts.is_transposed)
            out, into = shape[::-1] if transposed else shape
            out = len(range(out)[rows])
            r, scaling = max(A.shape[0] for A, *_ in pairs.values()), 1.0
            As, Bs = torch.zeros(E, r, into), torch.zeros(E, out, r)
            scalings = {pair[2] for pair in pairs.values()}
            if len(scalings) == 1:
                (scaling,) = scalings
            for e, (A, B, own) in pairs.items():
                self.fits(f"lora_A of {path}.{e}, {part},", A, (A.shape[0], into))
                self.fits(f"lora_B of {path}.{e}, {part},", B, (out, B.shape[1]))
                As[e, : A.shape[0]], Bs[e, :, : B.shape[1]] = A, B * (own / scaling)
            dtype = next(iter(pairs.values()))[0].dtype
            change = Change(As.to(dtype), Bs.to(dtype), scaling, rows, transposed)
            self.adapter.changes.setdefault(f"{path}.{name}", []).append(change)
            self.read_as("per expert", native=False)

    def rank_and_scaling(self, path: str, key: str) -> tuple[int, float]:
        """r and alpha / r of a pair for the module or parameter `key`, as PEFT finds them."""

        def pattern(name: str, default: float) -> float:
            found = (v for k, v in (self.config.get(name) or {}).items() if re.match(rf"(.*\.)?({k})$", key))
            return next(found, default)

        r, alpha = int(pattern("rank_pattern", self.config["r"])), pattern("alpha_pattern", self.config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        self.adapter.pairs[path] = r, scaling
        return r, scaling

    def fits(self, what: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise self.refused(
                f"{what} has the shape {tuple(value.shape)}, where its base and rank ask for {shape}. It is another "
                f"model's adapter, or {CONFIG} is another adapter's (r, rank_pattern)"
            )

    def checked(self, name: str) -> None:
        if self.tied and id(self.parameters[name]) in self.of_tied:
            raise self.refused(
                f"it changes {name}, which the base ties to its other end: merged, the change would count at both. "
                f"Untie the base first (tie_word_embeddings=false, and save it)"
            )

    def read_as(self, layout: str, native: bool) -> None:
        self.adapter.layout, self.adapter.native = layout, self.adapter.native and native

    def refused(self, why: str) -> AdapterError:
        return AdapterError(f"The adapter in {self.adapter.folder} cannot be read: {why}.")


def place(experts: Any, part: str) -> tuple[str, slice]:
    """(parameter, its rows) where an experts module of Transformers' has `gate`, `up`, `down`, or `all` of gate and up.

    What SGLang calls the gate of experts that have none is their up-projection.
    """
    if part == "down" or not experts.has_gate:
        return "down_proj" if part == "down" else "up_proj", slice(None)
    if part == "all":
        return "gate_up_proj", slice(None)
    second = part == "up"
    if not experts.is_concatenated:
        return "gate_up_proj", slice(int(second), None, 2)
    half = experts.gate_up_proj.shape[2 if experts.is_transposed else 1] // 2
    return "gate_up_proj", slice(half, None) if second else slice(0, half)
