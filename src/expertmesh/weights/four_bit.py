"""Experts in 4 bits through Transformers' quantizer interface: loaded shard by shard, and saved as they are.

    quantization = ExpertsQuantConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", quantization_config=quantization)

Every weight of routed experts becomes a `Packed` as soon as its stack is read, so that no more than one is in memory
unpacked. A checkpoint whose experts are in 4 bits already, as GPT-OSS's in MXFP4, is not unpacked at all
(quantized.py reads it). All other weights keep the dtype that the model is loaded in.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertmesh.kernels.packed import FORMATS, DecodeBuffer, Packed, packed_in
from expertmesh.moe.experts import is_experts, uses_fast_experts, why_not
from expertmesh.moe.lora import WEIGHTS
from expertmesh.weights.write import in_parts, with_copies

METHOD = "expertmesh_4bit"  # in config.json


@register_quantization_config(METHOD)
class ExpertsQuantConfig(QuantizationConfigMixin):
    """`quantization_config=` of `AutoModelForCausalLM`: weights of routed experts are kept in 4 bits, and frozen.

    format: "nf4" (4.25 bits a weight) or "mxfp4" (also 4.25; what GPT-OSS is published in stays as it is). Raises
    ValueError for another one.
    """

    def __init__(self, format: str = "nf4", quant_method: str = METHOD, stored: dict[str, Any] | None = None):
        """stored: the quantization_config of a checkpoint that is kept, and which is saved again."""
        if format not in FORMATS:
            raise ValueError(f"There is no format {format!r} for experts in 4 bits: choose one of {sorted(FORMATS)}.")
        self.format, self._stored = format, stored
        self.quant_method: Any = quant_method

    def to_dict(self) -> dict[str, Any]:
        return dict(self._stored or {"quant_method": self.quant_method, "format": self.format})

    def kept_from(self, stored: dict[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config holds experts as they are to be kept.

        Raises ValueError if they are in another format of ours.
        """
        method = stored.get("quant_method")
        if method == METHOD and stored["format"] != self.format:
            raise ValueError(
                f"The checkpoint's experts are in {stored['format']} already, not in {self.format}: leave "
                f"quantization_config= out, or load the checkpoint that it was made from."
            )
        return method == METHOD or (method == "mxfp4" and self.format == "mxfp4")


def pack(model: Any, quantization: ExpertsQuantConfig) -> None:
    """Put the weights of a fused model's experts into 4 bits, as loading does; on the meta device without values."""
    quantizer = ExpertsQuantizer(quantization, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """What Transformers asks of a quantizer when it loads, trains and saves a model."""

    quantization_config: ExpertsQuantConfig
    is_trainable = True  # adapters, that is
    quantized_element_size: Any = 4.25 / 8  # in either format

    def is_serializable(self, **_: Any) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Raises ValueError where weights would be moved in and out of the GPU's memory by Accelerate."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("Experts in 4 bits cannot be offloaded to the CPU or the disk: change device_map.")

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        model.experts_buffer = buffer = DecodeBuffer()
        found = list(_weights(model))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no experts that this library computes, so nothing can be kept in 4 bits: "
                f"load it by expertmesh.AutoModelForCausalLM with its experts fused, or without quantization."
            )
        while found:  # so that each is freed when it is packed
            experts, name, weight = found.pop()
            held = Packed.like(weight, self.quantization_config.format, experts.is_transposed, buffer)
            if not weight.is_meta:
                held.copy_(weight)
            experts._parameters[name] = nn.Parameter(held, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        model._weight_conversions = []  # saved under the model's own names: packed stacks are not taken apart

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return packed_in(model.get_parameter_or_buffer(param_name)) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """(the model's tensors, of packed weights blocks and scales as in files of GPT-OSS; {})"""
        return in_parts(with_copies(model, None) or model.state_dict()), {}


class _Pack(ConversionOps):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> Any:  # type: ignore[override]
        """{name: weights, or a list with them} as packed weights like those that stand in the model."""
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        place = packed_in(model.get_parameter(name))
        assert place is not None
        if isinstance(weight, Packed):
            held = Packed(weight.codes, weight.scales, place.format, place.dtype, place.transposed, place.buffer)
        else:
            held = Packed.like(weight, place.format, place.transposed, place.buffer).copy_(weight)
        return {name: nn.Parameter(held, requires_grad=False)}


def _weights(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(experts, name of a weight, the weight) of a model. Raises ValueError if some experts cannot run here."""
    for module in model.modules():
        if not is_experts(module):
            continue
        if not getattr(module, "in_fused_model", False) or not uses_fast_experts(module):
            raise ValueError(
                "Experts are kept in 4 bits only where this library computes them, and here it does not"
                f"{f': {why}' if (why := why_not(module)) else ''}. Load the model by "
                "expertmesh.AutoModelForCausalLM with its experts fused, or without quantization."
            )
        for name in sorted(WEIGHTS & module._parameters.keys()):
            yield module, name, module._parameters[name]
