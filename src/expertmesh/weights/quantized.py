"""Quantized checkpoints, dequantized while they are loaded, so that the weights can be trained and saved unquantized.

Transformers 5.23 can dequantize block-FP8 weights while loading. But it refuses them or scales them wrongly if the last
block is incomplete (DeepSeek V3's kv_a_proj_with_mqa has 576 rows in blocks of 128) or if a rank reads a slice, and it
cannot save the model afterwards. This module passes its loader tensors that look unquantized: each slice is dequantized
when it is indexed, so no more than that is in memory. To add a quantization method, add a function to `READERS`.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from expertmesh import backends
from expertmesh.kernels import packed as four_bit
from expertmesh.kernels.packed import DecodeBuffer, Packed
from expertmesh.twins import Fast
from expertmesh.weights.four_bit import METHOD, ExpertsQuantConfig
from expertmesh.weights.read import safetensors_slices

Tensors = dict[str, Any]  # {name: a safetensors slice, or an object that can be indexed like one}


class BlockFP8:
    """A block-FP8 weight [.., M, N], which reads and dequantizes to float32 when it is indexed. weight: a safetensors
    slice. scales: one of shape [.., ceil(M / block[0]), ceil(N / block[1])] and any float dtype."""

    def __init__(self, weight: Any, scales: Any, block: tuple[int, int]):
        self.weight, self.scales, self.block = weight, scales, block

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the float32 values at `...`, or at a tuple of slices without steps, one per dimension."""
        if index is ...:
            index = (slice(None),) * len(self.get_shape())
        *outer, rows, columns = index
        (top, bottom, _), (left, right, _) = map(slice.indices, (rows, columns), self.get_shape()[-2:])
        M, N = self.block
        scales = self.scales[(*outer, slice(top // M, -(-bottom // M)), slice(left // N, -(-right // N)))].float()
        scales = scales.repeat_interleave(N, -1)[..., left % N : left % N + max(right - left, 0)]
        weight = self.weight[tuple(index)].float()
        for i in range(scales.shape[-2]):  # expanded to all rows, scales would be as large as the weights
            start = max(i * M - top % M, 0)
            weight[..., start : (i + 1) * M - top % M, :].mul_(scales[..., i : i + 1, :])
        return weight


def _read_fp8(stored: dict[str, Any], tensors: Tensors) -> Tensors:
    block = tuple(stored["weight_block_size"])
    for name in [name for name, tensor in tensors.items() if tensor.get_dtype() == "F8_E4M3"]:
        if f"{name}_scale_inv" not in tensors:
            raise ValueError(
                f"The checkpoint holds {name} in FP8 without {name}_scale_inv, the scales of its blocks: it is cut "
                f"short or in another format. Give quantization_config= to have Transformers read it."
            )
        tensors[name] = BlockFP8(tensors[name], tensors.pop(f"{name}_scale_inv"), block)
    return tensors


class MXFP4:
    """Experts' weights [E, I, O] in MXFP4, packed along I, which are read and decoded exactly to bfloat16 when indexed.
    blocks: a safetensors slice [E, O, I / 32, 16] with two 4-bit floats per byte, the first in the lower half. scales:
    a safetensors slice [E, O, I / 32] with the exponent of the scale of 32 weights, plus 127."""

    def __init__(self, blocks: Any, scales: Any):
        self.blocks, self.scales = blocks, scales

    def get_shape(self) -> list[int]:
        E, O, groups, size = self.blocks.get_shape()  # noqa: E741
        return [E, 2 * groups * size, O]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Index as in `BlockFP8`. It decodes one expert at a time to save memory."""
        index = (slice(None),) * 3 if index is ... else index
        (first, end, _), (left, right, _), (top, bottom, _) = map(slice.indices, index, self.get_shape())
        result = torch.empty(max(end - first, 0), max(right - left, 0), max(bottom - top, 0), dtype=torch.bfloat16)
        groups = slice(left // 32, -(-right // 32))
        for expert in range(len(result)):
            at = slice(first + expert, first + expert + 1), slice(top, bottom), groups
            codes, scales = self.blocks[at].flatten(-2), self.scales[at]
            weights = result.new_empty(*codes.shape[:2], 32 * scales.shape[2])
            four_bit.decode_reference(codes, scales, "mxfp4", weights)
            result[expert] = weights[0, :, left % 32 :][:, : right - left].t()
        return result


class PackedExperts(MXFP4):
    """Experts in MXFP4 or NF4 that stay packed: indexing returns a `Packed` of whole experts."""

    def __init__(self, blocks: Any, scales: Any, format: str):
        super().__init__(blocks, scales)
        self.format = format

    def __getitem__(self, index: Any) -> torch.Tensor:
        experts = slice(None) if index is ... else index[0]
        assert index is ... or [slice(0, n) for n in self.get_shape()[1:]] == [*index[1:]], "ranks have whole experts"
        blocks, scales = self.blocks[experts], self.scales[experts]
        return Packed(blocks.flatten(-2), scales, self.format, torch.bfloat16, False, DecodeBuffer())


def _read_packed(read: Callable[[Any, Any], Any], tensors: Tensors) -> Tensors:
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        if f"{name}_scales" not in tensors:
            raise ValueError(f"The checkpoint holds {name}_blocks without {name}_scales: it is cut short.")
        tensors[name] = read(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    return tensors


#: {quant_method: function of the checkpoint's quantization_config and tensors that returns dequantizing tensors}
READERS: dict[str, Callable[[dict[str, Any], Tensors], Tensors]] = {
    "fp8": _read_fp8,
    "mxfp4": lambda stored, tensors: _read_packed(MXFP4, tensors),
}


class ReadsQuantized(Fast):
    """Mixin of fused model classes that loads quantized checkpoints for training."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but weights in a format of `READERS` are dequantized, unless `quantization_config=` is
        given. With an `ExpertsQuantConfig` all weights but experts are, and experts in 4 bits are kept."""
        config, requested = kwargs.get("config"), kwargs.get("quantization_config")
        if isinstance(config, PreTrainedConfig) and (requested is None or isinstance(requested, ExpertsQuantConfig)):
            kwargs["config"] = config = copy.deepcopy(config)
            stored: Any = getattr(config, "quantization_config", None)
            stored = stored if isinstance(stored, dict) else {}
            method = stored.get("quant_method")
            if method == METHOD and requested is None:
                requested = ExpertsQuantConfig.from_dict(stored)
            if requested is not None:
                kept_config = stored if requested.kept_from(stored) else None
                kwargs["quantization_config"] = ExpertsQuantConfig(requested.format, stored=kept_config)
            if method == METHOD or (method in READERS and (method != "fp8" or stored.get("weight_block_size"))):
                del config.quantization_config
                config._stored_quantization = stored  # for `_load_pretrained_model`
                config.dtype = config.dtype or torch.bfloat16
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """As in Transformers, but from tensors that are dequantized when they are read."""
        load, files = PreTrainedModel._load_pretrained_model, checkpoint_files
        stored = vars(model.config).pop("_stored_quantization", None)
        if stored is None:
            return load(model, state_dict, files, load_config, expected_keys)
        method = stored["quant_method"]
        name, source = load_config.pretrained_model_name_or_path, method.upper()
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise ValueError(f"{name} is quantized ({source}), and only safetensors files of it can be read.")
        if "disk" in (load_config.device_map or {}).values():
            raise ValueError(f"{name} is quantized ({source}): it cannot stay on the disk. Change device_map.")
        requested = getattr(load_config.hf_quantizer, "quantization_config", None)
        if requested is not None and requested.kept_from(stored):
            read = partial(_read_packed, partial(PackedExperts, format=requested.format))
        else:
            read, dtype = partial(READERS[method], stored), str(load_config.dtype).removeprefix("torch.")
            backends.logger().info(
                f"expertmesh: {name} is quantized ({source}). Its weights become {dtype} while they are read, to be "
                f"trained; give quantization_config= to keep them quantized."
                if requested is None
                else f"expertmesh: {name} is quantized ({source}). Its experts become {requested.format} while they "
                f"are read, all other weights {dtype}."
            )
            model._dequantized_from = source
        with safetensors_slices(files) as tensors:
            return load(model, read(tensors), files, load_config)


def tell_saved(model: Any, folder: Any) -> None:
    """Log the dtype of a saved checkpoint if the model was loaded from a quantized one."""
    before = getattr(model, "_dequantized_from", None)
    if before is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        backends.logger().info(
            f"expertmesh: {folder} holds {dtype} weights and no quantization_config; it was loaded from {before}."
        )


def forget_packed_names(model: Any) -> None:
    """Make a model that Transformers dequantized save its weights under their own names. Transformers 5.23 would save
    them under the names of the packed tensors, which no loader accepts."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    if any(type(op).__name__.endswith("Dequantize") for c in conversions for op in getattr(c, "operations", ())):
        del model._weight_conversions
