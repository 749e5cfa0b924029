"""The files of a LoRA adapter, and its updates of the base model's parameters. Pickles are never read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: options of LoRA variants that are more than a low-rank product
VARIANTS = (
    "use_dora use_qalora use_bdlora lora_bias fan_in_fan_out alora_invocation_tokens arrow_config kasa_config "
    "velora_config monteclora_config layer_replication trainable_token_indices"
).split()


class AdapterError(ValueError):
    """The adapter cannot be read, or does not fit its base. The message is one paragraph that names the fix."""


class Change(NamedTuple):
    """The update scaling · B @ A that an adapter adds to a parameter, or to some rows of it.

    A: [r, in], or [E, r, in] for experts. B: [out, r] or [E, out, r]. rows: the rows of `out` that B updates, such as
    the gate in a fused gate and up. transposed: the parameter is stored as [.., in, out].
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    rows: slice = slice(None)
    transposed: bool = False

    def add_to(self, weight: torch.Tensor) -> None:
        """Add the update in place to a float32 tensor of the parameter's shape."""
        index = (..., self.rows, slice(None)) if not self.transposed else (..., slice(None), self.rows)
        product = (self.B.float() @ self.A.float()).mul_(self.scaling)
        weight[index] += product.transpose(-1, -2) if self.transposed else product


@dataclass
class Adapter:
    """An adapter, read for one base model.

    changes: {parameter name: updates}. replaced: {parameter name: whole tensor} of `modules_to_save`. pairs: {module
    path in the file: (rank, scaling)}. layout: the detected layout of experts. native: whether PEFT reads it as it is.
    """

    folder: Path
    config: dict[str, Any]
    changes: dict[str, list[Change]] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    pairs: dict[str, tuple[int, float]] = field(default_factory=dict)
    layout: str = "no experts"
    native: bool = True

    def delta(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the sum of all updates of a parameter, in float32 and of its shape."""
        total = torch.zeros(shape)
        for change in self.changes[name]:
            change.add_to(total)
        return total

    @torch.no_grad()
    def add_to(self, model: nn.Module) -> None:
        """Merge the adapter into a model's weights in place. Sums are float32 and rounded once."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.replaced:
                parameter.copy_(self.replaced[name])
            if name in self.changes:
                parameter.copy_(parameter.float() + self.delta(name, parameter.shape).to(parameter.device))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a LoRA adapter. Raises AdapterError if it is missing, damaged, or of no LoRA."""
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder. Name a local folder with {CONFIG} and {WEIGHTS}.")
    path = folder / CONFIG
    if not path.is_file():
        hint = " It has a config.json: that is a model, not an adapter." if (folder / "config.json").is_file() else ""
        raise AdapterError(f"{folder} has no {CONFIG}, so it is no adapter of PEFT's.{hint}")
    try:
        config = json.loads(path.read_text())
        kind, ranks = config["peft_type"], (config["r"], config["lora_alpha"])
        if kind != "LORA":
            raise AdapterError(f"{folder} is an adapter of the kind {kind}: only LORA can be merged and served.")
        if not all(isinstance(number, int | float) and number > 0 for number in ranks):
            raise KeyError(f"r and lora_alpha are {ranks}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{path} cannot be read as a LoRA configuration ({error!r}). Restore it from a copy."
        ) from None
    used = [key for key in VARIANTS if config.get(key)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        used.append(f"init_lora_weights={init!r}, which changes the base, too; have PEFT convert it to plain LoRA,")
    if used:
        raise AdapterError(
            f"{folder} uses {', '.join(used)}: that is more than a low-rank product. Merge it with PEFT."
        )
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of adapter_model.safetensors. Raises AdapterError if it is missing, damaged or pickled."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [file.name for file in folder.glob("adapter_model.*") if file.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            raise AdapterError(
                f"{folder} holds {pickled[0]}, a pickle, which can run code when it is read. Load it where you trust "
                f"it and save it again with PEFT (safe_serialization=True)."
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}. Copy the whole adapter.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged ({error}). Copy or download it again.") from None
    if broken := [key for key, value in tensors.items() if value.numel() and not value.isfinite().all()]:
        raise AdapterError(f"{path} holds numbers that are not finite, first in {broken[0]}: take a checkpoint before.")
    if not tensors:
        raise AdapterError(f"{path} holds no tensors: no module matched when it was made. Train it again.")
    return tensors
