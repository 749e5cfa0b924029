"""4-bit experts through Transformers' quantizer interface.

    quantization = ExpertsQuantConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", quantization_config=quantization)

Each stacked expert weight becomes a `Packed` as soon as it is read, so at most one is in memory unpacked. Experts that
the checkpoint stores in 4 bits, such as GPT-OSS's in MXFP4, are never unpacked (quantized.py reads them). All other
weights have the dtype in which the model is loaded.
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
from expertmesh.weights.write import with_copies, with_packed_parts

METHOD = "expertmesh_4bit"  # in config.json


@register_quantization_config(METHOD)
class ExpertsQuantConfig(QuantizationConfigMixin):
    """`quantization_config=` of `AutoModelForCausalLM` that keeps the weights of routed experts in 4 bits, frozen.

    format: "nf4" or "mxfp4", both 4.25 bits per weight. A checkpoint in MXFP4, such as GPT-OSS, is loaded as "mxfp4"
    without loss. Raises ValueError for other formats.
    """

    def __init__(self, format: str = "nf4", quant_method: str = METHOD, stored: dict[str, Any] | None = None):
        """stored: the quantization_config of the loaded checkpoint, if its format is kept; it is saved again."""
        if format not in FORMATS:
            raise ValueError(f"There is no format {format!r} for experts in 4 bits: choose one of {sorted(FORMATS)}.")
        self.format, self._stored = format, stored
        self.quant_method: Any = quant_method

    def to_dict(self) -> dict[str, Any]:
        return dict(self._stored or {"quant_method": self.quant_method, "format": self.format})

    def kept_from(self, stored: dict[str, Any]) -> bool:
        """Whether a checkpoint with the quantization_config `stored` has its experts in this format already. Raises
        ValueError if it was saved by this library in another format."""
        method = stored.get("quant_method")
        if method == METHOD and stored["format"] != self.format:
            raise ValueError(
                f"The checkpoint's experts are in {stored['format']} already, not in {self.format}: leave "
                f"quantization_config= out, or load the checkpoint that it was made from."
            )
        return method == METHOD or (method == "mxfp4" and self.format == "mxfp4")


def pack(model: Any, quantization: ExpertsQuantConfig) -> None:
    """Pack the expert weights of a fused model in place, as loading does. The model may be on the meta device."""
    quantizer = ExpertsQuantizer(quantization, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """Transformers' quantizer interface for loading, training and saving a model with 4-bit experts."""

    quantization_config: ExpertsQuantConfig
    is_trainable = True  # by adapters
    quantized_element_size: Any = 4.25 / 8  # in either format

    def is_serializable(self, **_: Any) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Raise ValueError if Accelerate would offload weights to the CPU or the disk."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("Experts in 4 bits cannot be offloaded to the CPU or the disk: change device_map.")

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        model.experts_buffer = buffer = DecodeBuffer()
        weights = list(_expert_weights(model))
        if not weights:
            raise ValueError(
                f"{type(model).__name__} has no experts that this library computes, so nothing can be kept in 4 bits: "
                f"load it by expertmesh.AutoModelForCausalLM with its experts fused, or without quantization."
            )
        while weights:  # popped, so that each is freed when it is packed
            experts, name, weight = weights.pop()
            held = Packed.like(weight, self.quantization_config.format, experts.is_transposed, buffer)
            if not weight.is_meta:
                held.copy_(weight)
            experts._parameters[name] = nn.Parameter(held, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        model._weight_conversions = []  # packed stacks cannot be split into per-expert tensors when saved

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return packed_in(model.get_parameter_or_buffer(param_name)) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return (state dict in which packed weights are blocks and scales as in GPT-OSS's checkpoints, {})."""
        return with_packed_parts(with_copies(model, None) or model.state_dict()), {}


class _Pack(ConversionOps):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> Any:  # type: ignore[override]
        """Pack {name: a weight, or a list with it} in the format of the model's packed parameter of that name."""
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        like = packed_in(model.get_parameter(name))
        assert like is not None
        if isinstance(weight, Packed):
            held = Packed(weight.codes, weight.scales, like.format, like.dtype, like.transposed, like.buffer)
        else:
            held = Packed.like(weight, like.format, like.transposed, like.buffer).copy_(weight)
        return {name: nn.Parameter(held, requires_grad=False)}


def _expert_weights(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Yield (experts module, parameter name, weight). Raises ValueError if this library cannot compute some experts."""
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
