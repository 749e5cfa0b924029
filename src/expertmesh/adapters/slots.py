"""Check whether an inference server applies every tensor of an adapter, by names, shapes, ranks and scalings.

Servers skip tensors with unknown names almost silently (sglang#25528, vllm#41754). The rules below are those of vLLM's
lora/model_manager.py, lora_model.py and lora_weights.py and of SGLang's lora/lora.py, mem_pool.py and utils.py. If the
server is installed, its own tables of names are used.
"""

import importlib
import importlib.util
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from expertmesh.adapters.files import Adapter, AdapterError
from expertmesh.adapters.layouts import PARTS, RANK_MAJOR, read_adapter
from expertmesh.adapters.serving import FUSED, SERVERS, VLLM_3D, refuse_multimodal, write_adapter
from expertmesh.moe.experts import is_experts
from expertmesh.weights.files import atomic_export

#: SGLang's names of the modules that it can adapt (lora/utils.py)
SGLANG_TARGETS = frozenset(
    "qkv_proj qkvr o_proj wo_ud out_proj in_proj in_proj_qkvz up_proj gate_up_proj down_proj fc1_latent_proj "
    "fc2_latent_proj embed_tokens lm_head fused_qkv_a_proj_with_mqa q_b_proj kv_b_proj indexer.wq_b indexer.wk "
    "indexer.weights_proj".split()
)
SGLANG_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | {
    "gate_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}


@dataclass(frozen=True)
class Lost:
    """A module whose adapter a server would not apply as trained, and what the server does instead."""

    path: str
    why: str


@dataclass(frozen=True)
class Rules:
    """A server's rules for a family. stacked: it reads one pair for all experts. known: whether it knows a path."""

    source: str
    stacked: bool = False
    known: Callable[[str], bool] = lambda path: True


def rules_of(server: str, model: PreTrainedModel) -> Rules:
    """Return the rules of the server's own tables if it can be imported, else of its documented names."""
    try:
        if importlib.util.find_spec(server) is not None:
            return _own_rules(server, model)
        reason = f"{server} is not installed"
    except Exception as error:  # a server that does not start on this machine
        reason = f"{server} cannot be imported here: {type(error).__name__}"
    source = f"documented names ({reason})"
    if server == "vllm":
        return Rules(source, stacked=model.config.model_type in VLLM_3D)
    return Rules(source, known=lambda path: any(target in path for target in SGLANG_TARGETS))


def _own_rules(server: str, model: PreTrainedModel) -> Rules:
    if server == "sglang":
        utils: Any = importlib.import_module("sglang.srt.lora.utils")
        targets = utils._KNOWN_LORA_TARGET_MODULES
        return Rules("SGLang's own table of modules", known=lambda path: any(target in path for target in targets))
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    parse = importlib.import_module("vllm.lora.utils").parse_fine_tuned_lora_name
    model_class: Any = registry._try_load_model_cls(type(model).__name__)
    if model_class is None:
        raise LookupError(type(model).__name__)
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)

    def known(path: str) -> bool:
        try:
            name = parse(f"base_model.model.{path}.lora_A.weight", mapper)[0]
        except ValueError:
            return False
        return not any(prefix in name for prefix in getattr(model_class, "lora_skip_prefixes", ()))

    return Rules("vLLM's own class and parser of names", bool(getattr(model_class, "is_3d_moe_weight", False)), known)


def lost(folder: Path, model: PreTrainedModel, server: str, layout: str | None = None) -> tuple[list[Lost], int, str]:
    """Return (modules that the server would not apply, number of modules in the adapter, source of the server's rules).
    Raises AdapterError if the adapter cannot be read or does not fit the model."""
    refuse_multimodal(model)
    adapter, rules = read_adapter(folder, model, layout), rules_of(server, model)
    paths = list(adapter.pairs)
    dropped = [Lost(name, _whole(server)) for name in adapter.replaced]
    non_gated = any(is_experts(module) and not module.has_gate for module in model.modules())
    family = model.config.model_type
    dropped += [Lost(path, why) for path in paths if (why := _why(path, server, rules, adapter, family, non_gated))]
    dropped += _incomplete(paths, server, rules, model)
    reported = {each.path for each in dropped}
    dropped += [each for each in _scalings(server, adapter) if each.path not in reported]
    return dropped, len(paths) + len(adapter.replaced), rules.source


def rewrite(
    folder: Path, model: PreTrainedModel, output: Path, reader: str, layout: str | None = None, base: str | None = None
) -> str:
    """Write an adapter for `vllm`, `sglang` or `peft` to `output`, and compare it with the original. Return the layout
    of the original. Raises AdapterError, and writes nothing, if the adapter cannot be read, or if the server would not
    apply all of it."""
    adapter = read_adapter(folder, model, layout)
    if output.resolve() == folder.resolve():
        raise AdapterError(f"{output} is what is read: write the adapter into another folder.")
    existed = output.exists()
    try:
        with atomic_export(output) as staging:
            write_adapter(adapter, model, staging, reader, base)
            again = read_adapter(staging, model)
            for name in again.changes.keys() | adapter.changes.keys():
                shape = model.get_parameter(name).shape
                was, is_now = (
                    a.delta(name, shape) if name in a.changes else torch.zeros(shape) for a in (adapter, again)
                )
                eps = max(torch.finfo(part.B.dtype).eps for part in again.changes[name])
                assert (was - is_now).abs().max() <= 4 * eps * was.abs().max(), f"{name} was written wrong"
            if reader in SERVERS and (dropped := lost(staging, model, reader)[0]):
                raise AdapterError(
                    f"{reader} would not apply all of {folder}: {dropped[0].path} {dropped[0].why} ({len(dropped)} "
                    f"such). Merge the adapter (`expertmesh merge`), or train it without them."
                )
    except BaseException:
        if not existed:
            shutil.rmtree(output, ignore_errors=True)
        raise
    return adapter.layout


def _whole(server: str) -> str:
    return "is saved whole (modules_to_save): " + (
        "vLLM refuses the adapter" if server == "vllm" else "SGLang adds no such weights"
    )


def _why(path: str, server: str, rules: Rules, adapter: Adapter, family: str, non_gated: bool) -> str | None:
    """Return the reason why the server would not apply a pair, or None. non_gated: the experts have no gate."""
    leaf = path.rpartition(".")[2]
    flat = re.search(r"\.experts(\.base_layer)*$", path) is not None
    single = re.search(r"\.experts\.\d+\.", path) is not None
    if (flat or single) and adapter.layout not in (RANK_MAJOR, "per expert"):
        return f"is laid out {adapter.layout}, which {server} reads as {RANK_MAJOR}: noise"
    if server == "vllm":
        if flat and not rules.stacked:
            return "is one pair for all experts; of this family vLLM reads experts.N.gate_proj, and wires this nowhere"
        if flat and not adapter.native:
            return "has the factors of the transposed weights, as PEFT wrote them before 0.19.1"
        if single and rules.stacked:
            return "is one expert's; of this family vLLM reads one pair for all experts, and refuses other names"
        if leaf == "kv_b_proj":
            return "is loaded and never used: vLLM has cut this weight in two before adapters come"
        if re.search(r"\.mixer\.gate$", path) and non_gated:
            return "is the router of experts without a gate, which vLLM leaves out"
        return None if rules.known(path) else "has a name that vLLM does not know"
    if flat:
        return "is one pair for all experts; SGLang reads experts.N.gate_proj, and skips this"
    if single and family == "gpt_oss":
        return "is an expert of GPT-OSS, for which SGLang documents no names"
    if single and non_gated and PARTS.get(leaf) == "up":
        return "is an up-projection of experts without a gate, which SGLang looks for as gate_proj"
    if single:
        return None if PARTS.get(leaf) else "has a name that SGLang does not know"
    normal = f"{path.rpartition('.')[0]}.{SGLANG_FUSED.get(leaf, leaf)}"
    if leaf == "up_proj" and not non_gated:
        normal = f"{path.rpartition('.')[0]}.gate_up_proj"
    return None if rules.known(normal) else "is no module that SGLang adapts: it skips this with a warning"


def _incomplete(paths: list[str], server: str, rules: Rules, model: PreTrainedModel) -> list[Lost]:
    """Return pairs with which the server fails, because it also needs others that the adapter lacks."""
    present, dropped = set(paths), []
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        if server == "sglang" and leaf in FUSED[0] and not {f"{parent}.q_proj", f"{parent}.v_proj"} <= present:
            dropped.append(Lost(path, "lacks its q_proj or v_proj: SGLang fuses them with it, and stops without them"))
        if server == "vllm" and rules.stacked and leaf == "experts" and f"{path}.base_layer" not in present:
            dropped.append(Lost(path, "lacks experts.base_layer, the pair for gate and up: vLLM stops without it"))
    groups: dict[str, set[tuple[int, str]]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)", path):
            groups.setdefault(match[1], set()).add((int(match[2]), match[3]))
    for module, pairs in groups.items() if server == "vllm" and not rules.stacked else ():
        experts: Any = next(m for m in model.modules() if is_experts(m))
        wanted, names = 3 if experts.has_gate else 2, {name for _, name in pairs}
        if len(names) != wanted or len(pairs) != wanted * experts.num_experts:
            dropped.append(Lost(module, f"lacks projections of some experts: vLLM wants all {wanted} of all experts"))
    return dropped


def _scalings(server: str, adapter: Adapter) -> list[Lost]:
    """Return pairs that a server applies with another scaling than they were trained with, or whose rank it refuses."""
    config, dropped = adapter.config, []
    r, alpha = config["r"], config["lora_alpha"]
    served = alpha / math.sqrt(r) if config.get("use_rslora") and server == "vllm" else alpha / r
    for path, (rank, trained) in adapter.pairs.items():
        expert = re.search(r"\.experts\.\d+\.", path)
        served_with = alpha / r if expert else served  # vLLM's pack_moe
        if server == "sglang" and rank != r:
            dropped.append(Lost(path, f"has rank {rank}, where SGLang takes r={r} for all and stops"))
        elif not math.isclose(served_with, trained, rel_tol=1e-6):
            dropped.append(
                Lost(path, f"was trained with the scaling {trained:g} and would be served with {served_with:g}")
            )
    return dropped
