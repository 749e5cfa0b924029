"""Merge a LoRA adapter into its base, file by file, and verify the result before it is published.

Only tensors that the adapter changes are computed, in float32, and rounded once to their dtype. All others are copied
bit for bit, with the keys and files of the base, its configuration and tokenizer. Weights in block FP8 or MXFP4 become
bfloat16 in the whole checkpoint, unless MXFP4 is to be packed again.

The verification compares float32 logits of a few tokens: those of the stock base with the adapter in PEFT, and those
of the base with our sums in its weights. Then stock Transformers loads the export, whose weights must equal these sums,
rounded. Rounding can change the choice of a router with nearly equal scores, so of eight rows of tokens the two that
differ most are ignored.
"""

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from expertmesh.adapters.files import Adapter, AdapterError, read_config, read_tensors
from expertmesh.adapters.layouts import read_adapter, skeleton
from expertmesh.adapters.serving import write_adapter
from expertmesh.auto import AutoModelForCausalLM
from expertmesh.kernels.packed import DecodeBuffer, Packed
from expertmesh.weights.files import SUMS, atomic_export, verify_sums
from expertmesh.weights.quantized import MXFP4, READERS, BlockFP8
from expertmesh.weights.read import safetensors_slices, weight_files

TOLERANCE = 1e-4  # relative to the largest logit, in float32


class NotEqualError(ValueError):
    """The merged model and the base with its adapter give different results."""


@dataclass(frozen=True)
class Proof:
    """The results of the verification. Differences of logits are relative to the largest logit.

    error: our sums against PEFT's. effect: base with adapter against base alone. rounding: rounded sums against float32
    ones. by: the reference. changed: number of parameters that the adapter changes, and those of experts among them.
    parameters: number of parameters compared. dequantized: the base's quantization method, if any.
    """

    error: float
    effect: float
    rounding: float
    by: str
    layout: str
    changed: tuple[int, int]
    parameters: int
    dequantized: str | None


def base_of(adapter: Path, base: str | None = None) -> str:
    """Return `base`, or else the base named in the adapter's configuration. Raises AdapterError if there is none."""
    name = base or read_config(adapter).get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"The adapter in {adapter} does not say of which model it is: name it with --base.")
    return name


def fetched(base: str) -> Path:
    """Return the folder of a model, downloaded if it is a Hub id. Raises AdapterError if it has no safetensors."""
    if Path(base).is_dir():
        folder = Path(base)
    else:
        try:
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
            )
        except Exception as error:
            raise AdapterError(
                f"The base {base!r} is neither a local folder nor can it be downloaded "
                f"({type(error).__name__}): name its folder with --base."
            ) from error
    files = weight_files(folder)
    if not files or (missing := [file.name for file in files if not file.is_file()]):
        what = missing[0] if files else "weights in safetensors files"
        raise AdapterError(f"The base {folder} lacks {what}. Copy the whole model, or name another copy with --base.")
    return folder


def base_model(base: str | Path) -> PreTrainedModel:
    """Return the stock model of a base on the meta device. Raises AdapterError if its config.json cannot be read, or if
    it is no causal language model."""
    try:
        return skeleton(AutoConfig.from_pretrained(base))
    except (ValueError, OSError, KeyError) as error:
        raise AdapterError(f"No model can be made of the config.json of the base {base}: {error}") from error


def merge(
    adapter: str | Path, base: str | None, output: str | Path, layout: str | None = None, pack: bool = False
) -> Proof:
    """Write the base with the adapter merged into its weights to `output`, if the verification succeeds.

    pack: pack the experts of a base in MXFP4 again, with the error `Proof.rounding`. Raises AdapterError if adapter and
    base cannot be read or do not fit, and NotEqualError if the verification fails.
    """
    source = fetched(base_of(Path(adapter), base))
    verify_sums(source)
    model = base_model(source)
    read = read_adapter(adapter, model, layout)
    if Path(output).resolve() in (source.resolve(), read.folder.resolve()):
        raise AdapterError(f"{output} is what is read: write the merged model into another folder.")
    existed = Path(output).exists()
    try:
        with atomic_export(output) as staging:
            return prove(staging, source, read, *write_merged(staging, source, model, read, pack))
    except BaseException:
        if not existed:
            shutil.rmtree(output, ignore_errors=True)
        raise


@torch.no_grad()
def write_merged(
    folder: Path, source: Path, model: PreTrainedModel, adapter: Adapter, pack: bool = False
) -> tuple[dict[str, torch.dtype | None], str | None]:
    """Write weights, index, configuration and tokenizer. Return ({changed parameter: dtype on disk, None for MXFP4},
    the base's quantization method or None)."""
    config = json.loads((source / "config.json").read_text())
    stored = config.pop("quantization_config", None)
    method = stored and stored.get("quant_method")
    if stored and (method not in READERS or (method == "fp8" and not stored.get("weight_block_size"))):
        raise AdapterError(f"The base {source} is quantized ({method}): merge into its unquantized original.")
    if pack and method != "mxfp4":
        raise AdapterError(f"The base {source} is not in MXFP4, so nothing can be packed again: leave out --mxfp4.")
    weight_map: dict[str, str] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    files, size = weight_files(source), 0
    with _base_tensors(files) as tensors:
        stored_tensors = READERS[method](stored, dict(tensors)) if stored else tensors
        pieces = _Pieces(model, adapter, stored_tensors)
        for file in files:
            with safe_open(file, "pt") as handle:
                names = [key.removesuffix("_blocks") for key in handle.keys()]  # noqa: SIM118 (not a dict)
            keys = [key for key in names if key in stored_tensors]
            written: dict[str, torch.Tensor] = {}
            for key in keys:
                if pack and isinstance(stored_tensors[key], MXFP4):
                    written |= _packed(key, stored_tensors[key], pieces)
                    dtypes |= dict.fromkeys({pieces.name_of[key]} if key in pieces.name_of else ())
                    continue
                value = stored_tensors[key][...]
                dtype = torch.bfloat16 if isinstance(stored_tensors[key], BlockFP8 | MXFP4) else value.dtype
                written[key] = pieces.merged(key, value).to(dtype).contiguous()
                if key in pieces.name_of:
                    dtypes[pieces.name_of[key]] = dtype
            save_file(written, folder / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(written, file.name)
            size += sum(value.nbytes for value in written.values())
        pieces.finish()
    if (source / SAFE_WEIGHTS_INDEX_NAME).is_file() and len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in source.iterdir():
        ours = path.name in (SUMS, SAFE_WEIGHTS_INDEX_NAME) or path.suffix == ".safetensors" or path.name[0] == "."
        if path.is_file() and not ours and path.suffix not in (".bin", ".pt", ".pth", ".gguf", ".md"):
            shutil.copy(path, folder)
    if stored and not pack:
        config |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return dtypes, method


def packed(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (blocks, scales) of `MXFP4` that are nearest to experts' weights [E, I, O], exact where possible."""
    held = Packed.like(weight_EIO, "mxfp4", True, DecodeBuffer())
    held.copy_(weight_EIO)
    return held.codes.unflatten(-1, (-1, 16)), held.scales


def _packed(key: str, stored: MXFP4, pieces: "_Pieces") -> dict[str, torch.Tensor]:
    """Return {key on disk: tensor} of an MXFP4 weight, merged and packed again if the adapter changes it."""
    both = (
        packed(pieces.merged(key, stored[...])) if key in pieces.name_of else (stored.blocks[...], stored.scales[...])
    )
    return {f"{key}_blocks": both[0], f"{key}_scales": both[1]}


@contextmanager
def _base_tensors(files: list[Path]) -> Iterator[dict[str, Any]]:
    try:
        with safetensors_slices(files) as tensors:
            yield tensors
    except SafetensorError as error:
        raise AdapterError(f"The base in {files[0].parent} is damaged ({error}). Copy or download it again.") from error


class _Pieces:
    """The adapter's updates, split as the base's checkpoint splits its weights. Each is computed when first needed."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, keys: Any):
        self.model, self.adapter = model, adapter
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.keys_of: dict[str, list[str]] = {name: [] for name in (*adapter.changes, *adapter.replaced)}
        self.name_of: dict[str, str] = {}
        for key in keys:
            name = rename_source_key(key, renamings, converters, model.base_model_prefix, self.shapes)[0]
            name = key if name not in self.shapes and key in self.shapes else name
            if name in self.keys_of:
                self.keys_of[name].append(key)
                self.name_of[key] = name
        if absent := [name for name, keys in self.keys_of.items() if not keys]:
            raise AdapterError(f"The base's checkpoint has no weights for {absent[0]}, which the adapter changes.")
        self.waiting: dict[tuple[str, str], torch.Tensor] = {}

    def merged(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the checkpoint, merged in float32 if the adapter changes it."""
        name = self.name_of.get(key)
        if name is None:
            return value
        for what in ("replaced", "changes"):
            if name in getattr(self.adapter, what) and (what, key) not in self.waiting:
                self._compute(what, name)
        if name in self.adapter.replaced:
            value = self.waiting.pop(("replaced", key))
        if name in self.adapter.changes:
            value = value.float() + self.waiting.pop(("changes", key))
        return value

    def _compute(self, what: str, name: str) -> None:
        whole = self.adapter.replaced[name] if what == "replaced" else self.adapter.delta(name, self.shapes[name])
        keys = sorted(self.keys_of[name], key=dot_natural_key)
        pieces = {keys[0]: whole} if len(keys) == 1 else revert_weight_conversion(self.model, {name: whole})
        split = sorted(pieces, key=dot_natural_key)
        if [_tail(key) for key in keys] != [_tail(key) for key in split]:
            raise AdapterError(f"The base's checkpoint names the weights of {name} in an unknown way.")
        self.waiting |= {(what, key): pieces[piece] for key, piece in zip(keys, split, strict=True)}

    def finish(self) -> None:
        assert not self.waiting, f"not in the checkpoint: {sorted(self.waiting)}"


def _tail(key: str) -> str:
    return key.rpartition(".experts.")[2] if ".experts." in key else ""


@torch.no_grad()
def prove(
    export: Path, source: Path, adapter: Adapter, dtypes: dict[str, torch.dtype | None], dequantized: str | None = None
) -> Proof:
    """Compare an export with its base and adapter. Raises NotEqualError, and AdapterError if memory is insufficient."""
    stock: Any = transformers.AutoModelForCausalLM
    load: Any = AutoModelForCausalLM if dequantized else stock  # ours reads more quantized formats
    reader = load if None in dtypes.values() else stock
    merged, info = reader.from_pretrained(export, output_loading_info=True, dtype="auto")
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:
        raise NotEqualError(f"Stock Transformers does not find {missing[0]} in the merged model. Nothing was written.")
    tokens = _tokens(merged.config.get_text_config().vocab_size)
    digests = {name: (value.dtype, _digest(value)) for name, value in merged.state_dict().items()}
    need, free = 4 * sum(p.numel() for p in merged.parameters()), _free_memory()
    del merged
    gc.collect()
    if need > free:
        raise AdapterError(
            f"Verification needs the model in float32, {need / 1e9:.0f} GB of host memory, and {free / 1e9:.0f} GB "
            f"are free. Merge on a machine with more."
        )
    base = load.from_pretrained(source, dtype=torch.float32).float().eval()
    plain = base(tokens).logits
    adapted, by = _with_peft(base, adapter, tokens)
    adapter.add_to(base)
    summed = base(tokens).logits
    error, effect = _relative_difference(summed, adapted), _relative_difference(plain, adapted)
    if not error <= TOLERANCE:
        raise NotEqualError(
            f"The merged weights give other logits than base and adapter under {by}: they differ by {error:.1e} of "
            f"the largest, at most {TOLERANCE:.0e} is rounding. Nothing was written. The layout of the adapter was "
            f"read as {adapter.layout}; what wrote it may have another (--layout)."
        )
    state = base.state_dict()
    for name, (dtype, digest) in digests.items():
        stored = dtypes.get(name, dtype)
        value = MXFP4(*map(_AsSlices, packed(state[name])))[...] if stored is None else state[name].to(stored)
        value = value.to(dtype)
        if _digest(value) != digest:
            raise NotEqualError(f"{name} of the merged model is not what base and adapter give. Nothing was written.")
        state[name].copy_(value)
    rounding = _relative_difference(base(tokens).logits, summed)
    names = adapter.changes.keys() | adapter.replaced.keys()
    changed = len(names), sum(".experts." in name for name in names)
    return Proof(error, effect, rounding, by, adapter.layout, changed, len(digests), dequantized)


def _with_peft(base: PreTrainedModel, adapter: Adapter, tokens: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return (logits of the base with the adapter in PEFT, description of the reference). The base does not change."""
    import peft

    def logits(folder: Path) -> torch.Tensor | None:
        """Return None if PEFT cannot load all of the adapter."""
        wrapped = peft.PeftModel.from_pretrained(base, folder).eval()
        took_all = peft.get_peft_model_state_dict(wrapped).keys() == read_tensors(folder).keys()
        found = wrapped(input_ids=tokens).logits if took_all else None
        wrapped.unload()
        return found

    by = f"PEFT {peft.__version__}"
    if adapter.native and not adapter.replaced and (found := logits(adapter.folder)) is not None:
        return found, by
    before = {name: base.get_parameter(name).clone() for name in adapter.replaced}
    for name, value in adapter.replaced.items():
        base.get_parameter(name).copy_(value)
    with tempfile.TemporaryDirectory() as folder:
        if adapter.changes:
            write_adapter(adapter, base, Path(folder), "peft")
            found = logits(Path(folder))
            assert found is not None, "PEFT does not load the adapter in its own layout"
        else:
            found = base(tokens).logits
    for name, value in before.items():
        base.get_parameter(name).copy_(value)
    return found, f"{by}, from its own layout"


class _AsSlices:
    """A tensor with the interface of a safetensors slice."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


def _tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (8, 8), generator=torch.Generator().manual_seed(7))


def _relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference of logits relative to the largest logit, in the row with the third largest difference."""
    rows = (actual - expected).abs().flatten(1).amax(1) / expected.abs().max()
    return float(rows.nan_to_num(torch.inf).sort().values[-3])


def _digest(value: torch.Tensor) -> bytes:
    return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().data).digest()


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
