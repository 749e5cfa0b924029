"""Load and check all that a run needs except the weights, before these are loaded (minutes for 30 billion parameters).

The settings are tried on a single weight, the model is built on the meta device, every row is read and one conversation
of each shape is rendered. `expertmesh train --dry-run` stops after these checks.
"""

import copy
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from expertmesh import data
from expertmesh.fuse import loading
from expertmesh.kernels.packed import DecodeBuffer, Packed
from expertmesh.moe.block import routers
from expertmesh.moe.experts import is_experts
from expertmesh.plan.trace import quiet
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.conversations import check_rows
from expertmesh.train.errors import as_config_error, check_choice, install, short_message
from expertmesh.train.folder import check_folder
from expertmesh.weights.read import weight_files

log = logging.getLogger(__name__)


class Unreachable(ConfigError):
    """Raised for a model or dataset of the Hugging Face Hub while the Hub cannot be reached."""


class Inputs(NamedTuple):
    """The result of `gather`. Tokenizer and rows are None only if `gather` got a list `unreachable` and named them."""

    tokenizer: Any
    train_rows: Any
    eval_rows: Any


def gather(config: Config, unreachable: list[str] | None = None) -> Inputs:
    """Check all that a run needs except weights, and return tokenizer and rows. Raises ConfigError.

    unreachable: a list that gets the messages about models and datasets on the Hub if the Hub cannot be reached;
    without it, the first of them is raised.
    """

    def reach(load: Callable[..., Any], *args: Any) -> Any:
        try:
            return load(config, *args)
        except Unreachable as error:
            if unreachable is None:
                raise
            unreachable.append(str(error))
            return None

    check_settings(config)
    model_config, tokenizer = reach(load_model_config), reach(load_tokenizer)
    if model_config is not None:
        check_model(config, model_config, tokenizer)
    section, splits = config.data, []
    for split in (section.split, section.eval_split):
        rows = None if split is None else reach(load_rows, split)
        if rows is not None and tokenizer is not None:
            check_rows(config, tokenizer, rows, f"{section.name}, split {split},")
        splits.append(rows)
    if splits[0] is not None and section.eval_split is None and section.eval_fraction:
        with as_config_error("data.eval_fraction"):
            splits = [*data.hold_out(splits[0], section.eval_fraction, config.train.seed)]
    return Inputs(tokenizer, *splits)


def check_settings(config: Config) -> None:
    """Raise ConfigError for a folder, optimizer, schedule, tracker or fusion that cannot be used on this machine."""
    optim, schedule = config.train.optim, config.train.lr_scheduler_type
    check_choice("train.optim", optim, [*(name.value for name in OptimizerNames), "muon"])
    check_choice("train.lr_scheduler_type", schedule, [name.value for name in transformers.SchedulerType])
    for name in config.log.report_to:
        check_choice("log.report_to", name, ["none", "all", *INTEGRATION_TO_CALLBACK])
    with as_config_error(f"train.optim: {optim} cannot be used here"):
        # a real TrainingArguments would initialize the device, but this process may only launch the ranks
        defaults = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
        given = {"optim": OptimizerNames(config.train.optimizer()[0]), "learning_rate": config.train.learning_rate}
        arguments: Any = SimpleNamespace(**defaults | given)
        make, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = make([torch.zeros(1, requires_grad=True)], **options)
    if config.train.optim_states == "24bit" and config.model.dtype == "auto" and not torch.cuda.is_available():
        raise ConfigError("train.optim_states: 24bit extends bfloat16 weights. Set model.dtype=bfloat16, or take 8bit.")
    if schedule == "reduce_lr_on_plateau" and not config.log.eval_steps:
        raise ConfigError(f"train.lr_scheduler_type: {schedule} needs evaluations: set log.eval_steps.")
    with as_config_error(f"train.lr_scheduler_type: {schedule} needs arguments that no key can set"):
        transformers.get_scheduler(schedule, optimizer, 1, 10)
    for name in INTEGRATION_TO_CALLBACK.keys() & config.log.report_to:
        with as_config_error(
            f"log.report_to: {name} cannot be used here ({install(name)} adds it where it is missing)"
        ):
            INTEGRATION_TO_CALLBACK[name]()
    with as_config_error("model.fused: this value is not valid"), loading(config.model.fused):
        pass
    check_folder(config)


def load_model_config(config: Config) -> PreTrainedConfig:
    """Load the config.json of `model.name`."""
    with loading_part(config, "config.json"):
        model_config = AutoConfig.from_pretrained(**origin(config))
        if not isinstance(model_config.get_text_config().vocab_size, int):
            raise ValueError("it has no vocab_size, so it does not belong to a language model")
        return model_config


def load_tokenizer(config: Config) -> Any:
    """Load the tokenizer of `model.name`."""
    with loading_part(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**origin(config))
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # Transformers returns this if there are no files
            raise ValueError("it has no vocabulary, such as tokenizer.json")
        return tokenizer


def origin(config: Config) -> dict[str, Any]:
    """Return the `from_pretrained` arguments that name the model, for config, tokenizer and weights."""
    name = data.DEMO_FOLDER if config.model.name == "demo" else config.model.name
    options = config.model.model_dump(include={"revision", "trust_remote_code"})
    return {"pretrained_model_name_or_path": name, **options}


def load_rows(config: Config, split: str) -> Any:
    """Load a split of `data.name` as a Dataset in one of TRL's formats."""
    name = config.data.name
    try:
        return data.load_dataset(name, split, config.train.seed, name=config.data.config)
    except (ValueError, OSError) as error:
        kind = Unreachable if isinstance(error, data.Unreachable) else ConfigError
        source = "" if str(name) in str(error) else f"{name} cannot be read: "
        raise kind(f"data.name: {source}{error}") from error


def check_model(config: Config, model_config: PreTrainedConfig, tokenizer: Any = None) -> None:
    """Raise ConfigError if the model cannot be built or trained with this configuration, or has invalid token ids."""
    name, text = config.model.name, model_config.get_text_config()
    for owner, where, keys in (
        (text, "config.json", ("pad_token_id", "bos_token_id")),
        (tokenizer, "tokenizer", ("pad_token_id", "eos_token_id")),
    ):
        for key in keys:
            token = getattr(owner, key, None)
            if isinstance(token, int) and not -1 <= token < text.vocab_size:
                raise ConfigError(
                    f"model.name: in the {where} of {name} {key} is {token}, and the vocabulary has {text.vocab_size} "
                    "tokens. Set it to one of them, or take the file that belongs to the model."
                )
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of {name} has neither a pad_token nor an eos_token to pad short rows. Set "
            "one in its tokenizer_config.json."
        )
    if tokenizer is not None and len(tokenizer) > text.vocab_size:
        log.warning("The tokenizer of %s has %d tokens, and the model only %d.", name, len(tokenizer), text.vocab_size)
    if config.data.max_length > (limit := _positions(text)):
        raise ConfigError(
            f"data.max_length: {config.data.max_length} tokens are more than the {limit} positions {name} was made "
            "for. Lower it, or raise max_position_embeddings in its config.json."
        )
    if not hasattr(model_config, "auto_map"):  # remote code may not support the meta device
        _check_skeleton(config, model_config)
    if config.moe.router_aux_loss_coef and not hasattr(text, "output_router_logits"):
        raise ConfigError(f"moe.router_aux_loss_coef: {name} has no router logits to weigh. Remove the key.")
    if name != "demo" and Path(name).is_dir() and not config.model.random_weights:
        _check_files(Path(name))


def _positions(text: PreTrainedConfig) -> float:
    """Return a model's number of positions, extended by YaRN or other RoPE scaling; inf if config.json has none."""
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if not isinstance(limit, int) or limit < 1:
        return math.inf
    kinds = [scaled for scaled in (rope, *rope.values()) if isinstance(scaled, Mapping) and scaled.get("factor")]
    return max(limit, *(int(s["factor"] * (s.get("original_max_position_embeddings") or limit)) for s in kinds), 0)


def _check_skeleton(config: Config, model_config: PreTrainedConfig) -> None:
    name, attention = config.model.name, config.model.attn_implementation
    with quiet(), torch.device("meta"):
        with as_config_error(f"model.name: no causal language model can be made from the config.json of {name}"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
        if attention is not None and "/" not in attention:  # a name with "/" is a kernel on the Hub
            with as_config_error(f"model.attn_implementation: {name} cannot be run with {attention!r} here"):
                model.set_attn_implementation(attention)
        if config.moe.freeze_router and not any(routers(model)):
            raise ConfigError(f"moe.freeze_router: {type(model).__name__} has no routers. Remove the key.")
        if config.quantization is not None:
            with as_config_error(f"quantization.experts: {name} cannot have its experts in 4 bits"):
                weights = [(weight, m) for m in model.modules() if is_experts(m) for weight in m.parameters()]
                if not weights:
                    raise ValueError("it has none")
                for weight, experts in weights:
                    if weight.ndim == 3:
                        Packed.like(weight, config.quantization.experts, experts.is_transposed, DecodeBuffer())
        if (adapter := lora(config)) is not None:
            _check_targets(name, model, adapter)


def _check_targets(name: str, model: nn.Module, adapter: Any) -> None:
    """Raise ConfigError if one of the targets matches no module; PEFT raises only if none of them matches."""
    import peft

    linears = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    with as_config_error(f"lora.target_modules: {name} cannot get such adapters"), warnings.catch_warnings():
        warnings.filterwarnings("error", ".* were set but no (module|parameter) was matched")
        adapted = peft.get_peft_model(model, adapter).base_model
    paths = [f".{path}" for path in adapted.targeted_module_names + adapted.targeted_parameter_names]
    for key in ("target_modules", "target_parameters"):
        targets = getattr(adapter, key) or ()
        unmatched = [target for target in targets if not any(path.endswith(f".{target}") for path in paths)]
        if unmatched and not isinstance(targets, str):
            raise ConfigError(
                f"lora.{key}: {', '.join(sorted(unmatched))} matched nothing in {name}. Its linear layers are called "
                f"{', '.join(sorted(linears))}."
            )


def _check_files(folder: Path) -> None:
    """Raise ConfigError if weight files are missing or truncated. Of PyTorch's *.bin files one only has to exist."""
    with as_config_error(f"model.name: {folder / SAFE_WEIGHTS_INDEX_NAME} cannot be read"):
        files = weight_files(folder)
    if not files and not any(folder.glob("*.bin")):
        raise ConfigError(f"model.name: the folder {folder} has no weights ({SAFE_WEIGHTS_NAME}, or an index of more).")
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigError(f"model.name: {folder} lacks {', '.join(missing)}, which {SAFE_WEIGHTS_INDEX_NAME} names.")
    for path in files:
        with as_config_error(f"model.name: {path} is damaged, so load or copy it again"), safe_open(path, "pt"):
            pass


def lora(config: Config) -> Any:
    """Return PEFT's LoraConfig for the section `lora`, None if it is unset."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    names = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    return LoraConfig(task_type="CAUSAL_LM", **{names.get(key, key): value for key, value in config.lora})


def freeze_routers(config: Config, model: nn.Module) -> None:
    """Freeze the model's routers if `moe.freeze_router` is set."""
    for _, router in routers(model) if config.moe.freeze_router else ():
        router.requires_grad_(False)


@contextmanager
def loading_part(config: Config, what: str, errors: Any = Exception) -> Iterator[None]:
    """Context manager that turns errors while a part of `model.name` is loaded into a ConfigError with the fix."""
    try:
        yield
    except errors as error:
        name, why, kind = config.model.name, short_message(error), ConfigError
        if Path(name).is_dir():
            text = f"the {what} in the folder {name} cannot be read: {why}."
        elif Path(name).exists():
            text = f"{name} is not a folder. Name the folder of a model, with its config.json."
        elif name.startswith((".", "/")) or name.count("/") > 1:
            text = f"the folder {name} does not exist. Check the spelling, or name a Hub id."
        else:
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
                why, kind = "it is not in the cache, and HF_HUB_OFFLINE forbids fetching it", Unreachable
            elif "couldn't connect" in str(error):
                kind = Unreachable
            text = (
                f"there is no folder {name!r} here, and as a Hugging Face id its {what} cannot be loaded: {why}. Check "
                f"the spelling, name a local folder, run `hf download {name}` where there is a network, or use `demo`."
            )
        raise kind(f"model.name: {text}") from error
