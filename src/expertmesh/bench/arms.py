"""The arms of a benchmark: stock Transformers in several forms; expertmesh, whole or without one fusion or library."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from expertmesh import backends
from expertmesh.auto import AutoModelForCausalLM
from expertmesh.fuse import FUSIONS
from expertmesh.train.errors import install
from expertmesh.weights.four_bit import ExpertsQuantConfig

WITHOUT = "expertmesh-no-"
#: packages whose kernels replace ours if they are installed -> the function of `backends` that checks for each
LIBRARIES = {"quack-kernels": "has_quack", "flash-attn-4": "has_flash_attention"}


@dataclass(frozen=True)
class Arm:
    """One arm. `compiled`: torch.compile on each decoder layer. `flash`: Transformers' own integration of
    flash-attn-4. `without`: the one fusion or library that is off. `trainer`: trained by our trainer (`--loop`).
    `four_bit`: 4-bit experts with adapters (`--loop`); its random weights differ from those of the other arms.
    """

    name: str
    ours: bool = False
    compiled: bool = False
    liger: bool = False
    flash: bool = False
    without: str | None = None
    trainer: bool = False
    four_bit: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm("stock"),
        Arm("stock-compiled", compiled=True),
        Arm("stock-liger", liger=True),
        Arm("stock-flash-attn-4", flash=True),
        Arm("expertmesh", ours=True),
        Arm("expertmesh-trainer", ours=True, trainer=True),
        Arm("expertmesh-4bit", ours=True, four_bit=True),
        *(Arm(f"{WITHOUT}{name}", ours=True, without=name) for name in (*FUSIONS, *LIBRARIES)),
    )
}
DEFAULT = ("stock", "stock-compiled", "stock-liger", "expertmesh")


def why_not(arm: Arm, config: PreTrainedConfig, device: str) -> str | None:
    """Return why this arm cannot run this model on this machine and what to do about it, or None if it can."""
    if arm.liger:
        if backends.version_of("liger-kernel") is None:
            return f"liger-kernel is not installed: {install('liger-kernel')} adds it."
        if device == "cpu":
            return "Liger's kernels run on GPUs only."
        if config.model_type not in _liger_functions():
            return f"Liger has no kernels for {config.model_type}."
    if arm.flash and not backends.has_flash_attention(device):
        return "flash-attn-4 is not installed, or this is no Hopper GPU."
    if arm.without in LIBRARIES:
        return None if backends.version_of(arm.without) else f"{arm.without} is not installed."
    if arm.without:
        row = next(row for row in fusions_of(config) if row.name == arm.without)
        return None if row.on else f"that fusion is off for {config.model_type} anyway: {row.reason}."
    return None


def fusions_of(config: PreTrainedConfig) -> list[Any]:
    """Return the fusion report of a model of this configuration, from a model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).fusion_report()


@contextmanager
def model_of(
    arm: Arm, config: PreTrainedConfig, dtype: torch.dtype, device: str, attention: str | None = None
) -> Iterator[PreTrainedModel]:
    """Context manager that yields a trainable model of this arm, with the same weights in every arm except 4-bit ones.

    Liger monkey-patches modules of Transformers, so the model of its arm works only inside this context. On exit the
    patches are removed.
    """
    auto: Any = AutoModelForCausalLM if arm.ours else transformers.AutoModelForCausalLM
    own_attention = arm.ours and arm.without != "sink_attention"
    attention = "flash_attention_4" if arm.flash else attention
    options: dict[str, Any] = {"attn_implementation": attention} if attention and not own_attention else {}
    if arm.without and arm.without not in LIBRARIES:
        options["fused"] = {arm.without: False}
    if arm.four_bit:
        options["quantization_config"] = ExpertsQuantConfig("mxfp4" if config.model_type == "gpt_oss" else "nf4")
    torch.manual_seed(0)
    with _patched_by_liger(config.model_type, arm.liger), _hidden(arm.without):
        with torch.device(device):
            model = auto.from_config(config, dtype=dtype, **options).train()
        if arm.compiled:
            torch._dynamo.reset()
            for layer in model.base_model.layers:
                layer.compile()
        yield model


def _hidden(without: str | None) -> Any:
    """Context manager in which the library of this name counts as not installed."""
    return mock.patch.object(backends, LIBRARIES[without], lambda _: False) if without in LIBRARIES else nullcontext()


@contextmanager
def _patched_by_liger(model_type: str, on: bool) -> Iterator[None]:
    """Context manager that applies Liger's patches as its users get them, and restores the modeling module on exit."""
    if not on:
        yield
        return
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    own = [value for value in vars(modeling).values() if getattr(value, "__module__", None) == modeling.__name__]
    owners: list[Any] = [modeling, *(value for value in own if isinstance(value, type))]
    before = [dict(vars(owner)) for owner in owners]
    try:
        _liger_functions()[model_type]()
        yield
    finally:
        for owner, kept in zip(owners, before, strict=True):
            for name, value in dict(vars(owner)).items():
                if name not in kept:
                    delattr(owner, name)
                elif value is not kept[name]:
                    setattr(owner, name, kept[name])


def _liger_functions() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN
