"""Checkpoints with quantized weights, read as what these stand for: to be trained, and saved unquantized.

Transformers 5.23 can dequantize block-FP8 weights while it loads, but refuses them, or scales them wrongly, where the
last block is cut off (DeepSeek V3's kv_a_proj_with_mqa has 576 rows in blocks of 128) or a rank reads a slice, and it
cannot save them afterwards. Here its loader gets the tensors as if they were stored unquantized: each slice is
dequantized when it is read, so no more than that is in memory, and what follows is as with any checkpoint.

A further method of quantization is a function in `READERS`.
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
from expertmesh.weights.read import opened

Tensors = dict[str, Any]  # by name: slices of safetensors, or what can be indexed like them


class BlockFP8:
    """Weights [.., M, N] in FP8, each block of them times its scale, as a float32 tensor that is read when indexed.

    weight: a slice of safetensors; scales: that of [.., ceil(M / block[0]), ceil(N / block[1])] of any float dtype.
    """

    def __init__(self, weight: Any, scales: Any, block: tuple[int, int]):
        self.weight, self.scales, self.block = weight, scales, block

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Of a tuple of slices, one per dimension and without steps, or of `...`."""
        if index is ...:
            index = (slice(None),) * len(self.get_shape())
        *outer, rows, columns = index
        (top, bottom, _), (left, right, _) = map(slice.indices, (rows, columns), self.get_shape()[-2:])
        M, N = self.block
        scales = self.scales[(*outer, slice(top // M, -(-bottom // M)), slice(left // N, -(-right // N)))].float()
        scales = scales.repeat_interleave(N, -1)[..., left % N : left % N + max(right - left, 0)]
        weight = self.weight[tuple(index)].float()
        for i in range(scales.shape[-2]):  # scales of all rows would be as large as the weights
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
    """Weights [E, I, O] of experts in MXFP4, packed along I, as a bfloat16 tensor, exact, that is read when indexed.

    blocks: a slice of safetensors, [E, O, I / 32, 16]: two 4-bit floats a byte, the first in the lower half. scales:
    that of [E, O, I / 32], the exponents of the powers of two of 32 weights, plus 127.
    """

    def __init__(self, blocks: Any, scales: Any):
        self.blocks, self.scales = blocks, scales

    def get_shape(self) -> list[int]:
        E, O, groups, size = self.blocks.get_shape()  # noqa: E741
        return [E, 2 * groups * size, O]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of `BlockFP8`; one expert at a time, so that little more than the result is in memory."""
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


class Kept(MXFP4):
    """The same, or NF4, that stays so: `Packed` when it is read, of whole experts."""

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


#: how to read what a quant_method stores; each takes the checkpoint's quantization_config and its tensors
READERS: dict[str, Callable[[dict[str, Any], Tensors], Tensors]] = {
    "fp8": _read_fp8,
    "mxfp4": lambda stored, tensors: _read_packed(MXFP4, tensors),
}


class ReadsQuantized(Fast):
    """What a model class adds to its HF class to load quantized checkpoints for training."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but weights that `READERS` can read unquantized are, unless `quantization_config=` says
        how to keep them; with an `ExpertsQuantConfig` all but experts are, and what is in 4 bits already is kept."""
        config, asked = kwargs.get("config"), kwargs.get("quantization_config")
        if isinstance(config, PreTrainedConfig) and (asked is None or isinstance(asked, ExpertsQuantConfig)):
            kwargs["config"] = config = copy.deepcopy(config)
            stored: Any = getattr(config, "quantization_config", None)
            stored = stored if isinstance(stored, dict) else {}
            method = stored.get("quant_method")
            if method == METHOD and asked is None:
                asked = ExpertsQuantConfig.from_dict(stored)
            if asked is not None:
                kept = stored if asked.kept_from(stored) else None
                kwargs["quantization_config"] = ExpertsQuantConfig(asked.format, stored=kept)
            if method == METHOD or (method in READERS and (method != "fp8" or stored.get("weight_block_size"))):
                del config.quantization_config
                config._stored_quantization = stored  # for `_load_pretrained_model`
                config.dtype = config.dtype or torch.bfloat16
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """As in Transformers, from tensors that are dequantized when they are read."""
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
        asked = getattr(load_config.hf_quantizer, "quantization_config", None)
        if asked is not None and asked.kept_from(stored):
            read = partial(_read_packed, partial(Kept, format=asked.format))
        else:
            read, dtype = partial(READERS[method], stored), str(load_config.dtype).removeprefix("torch.")
            backends.logger().info(
                f"expertmesh: {name} is quantized ({source}). Its weights become {dtype} while they are read, to be "
                f"trained; give quantization_config= to keep them quantized."
                if asked is None
                else f"expertmesh: {name} is quantized ({source}). Its experts become {asked.format} while they are "
                f"read, all other weights {dtype}."
            )
            model._dequantized_from = source
        with opened(files) as tensors:
            return load(model, read(tensors), files, load_config)


def tell_saved(model: Any, folder: Any) -> None:
    """Say what a checkpoint holds that was loaded from a quantized one."""
    before = getattr(model, "_dequantized_from", None)
    if before is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        backends.logger().info(
            f"expertmesh: {folder} holds {dtype} weights and no quantization_config; it was loaded from {before}."
        )


def forget_packed_names(model: Any) -> None:
    """Of a model that Transformers dequantized: let it be saved under the names of its weights.

    Transformers 5.23 saves it under those of the packed tensors, which nothing loads.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    if any(type(op).__name__.endswith("Dequantize") for c in conversions for op in getattr(c, "operations", ())):
        del model._weight_conversions
