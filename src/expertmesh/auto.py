"""AutoModelForCausalLM: the one import line.

A subclass of Transformers' class of the same name. Its mapping from configuration to model class gives the fused twin
of every class whose experts are pluggable; everything else about loading is Transformers' own code, so every argument
of `from_pretrained` and `from_config` means what it means there.
"""

from typing import Any

import transformers
from transformers import PreTrainedConfig

from expertmesh.fuse import fuse, fused_class, has_fast_experts, refusing_missing_experts, requesting

_stock_mapping: Any = transformers.AutoModelForCausalLM._model_mapping


class _FusedMapping:
    """Transformers' mapping {configuration class: model class}, with fused classes where experts are pluggable."""

    def __getitem__(self, config_class: type) -> Any:
        found = _stock_mapping[config_class]
        return tuple(map(_fused, found)) if isinstance(found, tuple) else _fused(found)

    def __contains__(self, config_class: object) -> bool:
        return config_class in _stock_mapping

    def __iter__(self):
        return iter(_stock_mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(_stock_mapping, name)


def _fused(cls: Any) -> Any:
    return fused_class(cls) if has_fast_experts(cls) else cls


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """Transformers' `AutoModelForCausalLM`, whose Mixture-of-Experts models train several times faster.

    All arguments are Transformers'. One is added: `fused=True`; False returns the stock model, and a dict switches
    single fusions, as {"router": False} (`expertmesh.fuse.FUSIONS` names them).
    """

    _model_mapping: Any = _FusedMapping()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As Transformers', plus `fused`.

        Raises ValueError if weights of experts or routers are missing on disk, unless the caller asks for
        `output_loading_info`: Transformers would start them at random.
        """
        fused = kwargs.pop("fused", True)
        if fused is False:
            return transformers.AutoModelForCausalLM.from_pretrained(
                pretrained_model_name_or_path, *model_args, **kwargs
            )
        caller_looks = kwargs.get("output_loading_info", False)  # and sees for himself what is missing
        with requesting(fused), refusing_missing_experts(not caller_looks):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            if isinstance(loaded, tuple):  # output_loading_info=True
                return (fuse(loaded[0], fused), *loaded[1:])
            return fuse(loaded, fused)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """As Transformers', plus `fused`."""
        fused = kwargs.pop("fused", True)
        if fused is False:
            return transformers.AutoModelForCausalLM.from_config(config, **kwargs)
        with requesting(fused):
            return fuse(super().from_config(config, **kwargs), fused)
