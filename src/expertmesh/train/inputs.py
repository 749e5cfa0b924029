"""What a run needs beside weights, looked at before these are loaded, which takes minutes with 30 billion of them.

Settings are tried out on one weight, the model is built without memory (on the meta device), every row is looked at and
one conversation of each shape is rendered. `expertmesh train --dry-run` stops behind that.
"""

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen3MoeConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from expertmesh import data
from expertmesh.fuse import loading
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import in_short, install, known
from expertmesh.train.folder import check_folder
from expertmesh.train.routing import routers
from expertmesh.train.talks import check_rows

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
T = TypeVar("T")


class Unreachable(ConfigError):
    """A model or dataset that is on the Hugging Face Hub, which cannot be reached from here."""


class Inputs(NamedTuple):
    """What `gather` found. Only where it was asked to go on without, tokenizer and rows may be None."""

    tokenizer: Any
    train_rows: Any
    eval_rows: "Dataset | None"


def gather(config: Config, unreachable: list[str] | None = None) -> Inputs:
    """Tokenizer and rows of a run, once all that it needs beside weights was looked at. Raises ConfigError.

    What the Hub has, where the Hub cannot be reached, goes by name into `unreachable` if that is given.
    """

    def reach(load: Callable[[Config], T]) -> T | None:
        try:
            return load(config)
        except Unreachable as error:
            if unreachable is None:
                raise
            unreachable.append(str(error))
            return None

    check_settings(config)
    model_config, tokenizer = reach(load_model_config), reach(load_tokenizer)
    if model_config is not None:
        check_model(config, model_config)
        if tokenizer is not None:
            check_tokenizer(config, model_config, tokenizer)
    rows = reach(load_rows)
    if rows is None:
        return Inputs(tokenizer, None, None)
    train_rows, eval_rows = rows
    if tokenizer is not None:
        for part, which in ((train_rows, config.data.split), (eval_rows, config.data.eval_split)):
            if part is not None:
                check_rows(config, tokenizer, part, f"{config.data.name}, split {which},")
    if eval_rows is None and config.data.eval_fraction:
        try:
            train_rows, eval_rows = data.hold_out(train_rows, config.data.eval_fraction, config.train.seed)
        except ValueError as error:
            raise ConfigError(f"data.eval_fraction: {error}") from error
    return Inputs(tokenizer, train_rows, eval_rows)


@dataclasses.dataclass
class _Settings(transformers.TrainingArguments):
    """TrainingArguments that ask for no device: this process may be about to start others that need it."""

    def __post_init__(self):
        self.optim = OptimizerNames(self.optim)


def check_settings(config: Config) -> None:
    """Raises ConfigError for a folder, optimizer, schedule, tracker or fusion that cannot be used here."""
    settings = config.train
    known("train.optim", settings.optim, [name.value for name in OptimizerNames])
    known("train.lr_scheduler_type", settings.lr_scheduler_type, [name.value for name in transformers.SchedulerType])
    for name in config.log.report_to:
        known("log.report_to", name, ["none", "all", *INTEGRATION_TO_CALLBACK])
    with _refusing("train.optim", f"{settings.optim} cannot be used here"):
        arguments = _Settings(optim=settings.optim, learning_rate=settings.learning_rate)
        make, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = make([torch.zeros(1, requires_grad=True)], **options)
    with _refusing(
        "train.lr_scheduler_type", f"{settings.lr_scheduler_type} needs what no key of a configuration says"
    ):
        if settings.lr_scheduler_type == "reduce_lr_on_plateau" and not config.log.eval_steps:
            raise ValueError("it looks at evaluations: set log.eval_steps")
        transformers.get_scheduler(settings.lr_scheduler_type, optimizer, 1, 10)
    for name in config.log.report_to:
        if name in INTEGRATION_TO_CALLBACK:
            with _refusing(
                "log.report_to", f"{name} cannot be used here ({install(name)} adds it where it is missing)"
            ):
                INTEGRATION_TO_CALLBACK[name]()
    with _refusing("model.fused", "it cannot be switched so"), loading(config.model.fused):
        pass
    check_folder(config)


class _refusing:
    """Turns whatever goes wrong inside, in code of others, into a ConfigError of the key."""

    def __init__(self, key: str, what: str):
        self.key, self.what = key, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            raise ConfigError(f"{self.key}: {self.what}: {in_short(error)}.") from error


def load_model_config(config: Config) -> PreTrainedConfig:
    """The config.json of `model.name`."""
    if config.model.name == "demo":
        return demo_config()
    try:
        found = AutoConfig.from_pretrained(config.model.name, **_origin(config))
        if not isinstance(found.get_text_config().vocab_size, int):
            raise ValueError("it has no vocab_size, so it is no language model's")
        return found
    except Exception as error:  # a config.json may hold anything, and then anything may go wrong
        raise unreachable(config.model.name, "config.json", error) from error


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.name`."""
    if config.model.name == "demo":
        return data.demo_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.name, **_origin(config))
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what Transformers makes of no files at all
            raise ValueError("it has no vocabulary, such as tokenizer.json")
        return tokenizer
    except Exception as error:
        raise unreachable(config.model.name, "tokenizer", error) from error


def _origin(config: Config) -> dict[str, Any]:
    return {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}


def load_rows(config: Config) -> tuple["Dataset", "Dataset | None"]:
    """(rows of `data.split`, rows of `data.eval_split` or None), in one of TRL's formats."""
    section, seed = config.data, config.train.seed

    def load(split: str) -> "Dataset":
        try:
            return data.load_dataset(section.name, split, seed, name=section.config)
        except (ValueError, OSError) as error:
            kind = Unreachable if isinstance(error, data.Unreachable) else ConfigError
            source = "" if str(section.name) in str(error) else f"{section.name} cannot be read: "
            raise kind(f"data.name: {source}{error}") from error

    return load(section.split), None if section.eval_split is None else load(section.eval_split)


def check_model(config: Config, model_config: PreTrainedConfig) -> None:
    """Raises ConfigError where the model cannot be built, or cannot be trained as the configuration says."""
    name, text = config.model.name, model_config.get_text_config()
    for key in ("pad_token_id", "bos_token_id"):
        token = getattr(text, key, None)
        if isinstance(token, int) and not -1 <= token < text.vocab_size:
            raise ConfigError(
                f"model.name: in the config.json of {name} {key} is {token}, and the vocabulary has {text.vocab_size} "
                "tokens. Set it to one of them, or to null."
            )
    limit = _positions(text)
    if limit is not None and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} tokens are more than the {limit} positions {name} was made "
            "for. Lower it, or set max_position_embeddings in its config.json if it is to learn longer rows."
        )
    if not hasattr(model_config, "auto_map"):  # code that comes with a checkpoint may not know the meta device
        _check_skeleton(config, model_config)
    if config.moe.router_aux_loss_coef and not hasattr(text, "output_router_logits"):
        raise ConfigError(
            f"moe.router_aux_loss_coef: {name} is no Mixture-of-Experts model with router logits to weigh. Remove it."
        )
    if Path(name).is_dir():
        _check_files(Path(name))


def _positions(text: PreTrainedConfig) -> int | None:
    """How many positions a model has, YaRN's and the like counted; None where its config.json does not say."""
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    found = [limit]
    for scaled in [rope, *rope.values()] if isinstance(rope, Mapping) else []:  # of each kind of layer, in some
        if isinstance(scaled, Mapping) and isinstance(factor := scaled.get("factor"), int | float):
            found.append(int(factor * (scaled.get("original_max_position_embeddings") or limit)))
    return max(found)


def _check_skeleton(config: Config, model_config: PreTrainedConfig) -> None:
    name, attention, level = config.model.name, config.model.attn_implementation, transformers.logging.get_verbosity()
    if attention is not None and "/" in attention:
        attention = None  # a kernel of the Hub
    transformers.logging.set_verbosity_error()  # the model itself will say it again
    try:
        with torch.device("meta"):
            with _refusing("model.name", f"no causal language model can be made from the config.json of {name}"):
                model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
            with _refusing("model.attn_implementation", f"{name} cannot be run with {attention!r} here"):
                if attention is not None:
                    model.set_attn_implementation(attention)
            if config.moe.freeze_router and not any(routers(model)):
                raise ConfigError(
                    f"moe.freeze_router is set, and {type(model).__name__} has no routers. Remove the key."
                )
            adapter = lora(config)
            with _refusing("lora.target_modules", f"{name} cannot get such adapters"):
                if adapter is not None:
                    import peft

                    peft.get_peft_model(model, adapter)
    finally:
        transformers.logging.set_verbosity(level)


def _check_files(folder: Path) -> None:
    """Raises ConfigError where weights are missing or cut short. PyTorch's own files only have to be there."""
    found = sorted(folder.glob("*.safetensors"))
    if not found and not any(folder.glob("*.bin")):
        raise ConfigError(
            f"model.name: the folder {folder} has no weights ({SAFE_WEIGHTS_NAME}, or several such files)."
        )
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        with _refusing("model.name", f"{index} cannot be read"):
            named = {folder / str(file) for file in json.loads(index.read_text())["weight_map"].values()}
        if missing := sorted(str(path.name) for path in named if not path.is_file()):
            raise ConfigError(f"model.name: {folder} lacks {', '.join(missing)}, which {index.name} names.")
    for path in found:
        with _refusing("model.name", f"{path} is damaged, so load or copy it again"), safe_open(path, "pt"):
            pass


def check_tokenizer(config: Config, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for tokens that the model does not have."""
    name, size = config.model.name, model_config.get_text_config().vocab_size
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of {name} has neither a pad_token nor an eos_token, and short rows are filled "
            "up with one of them. Set it in its tokenizer_config.json."
        )
    for key in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, key)
        if token is not None and token >= size:
            raise ConfigError(
                f"model.name: {key} of the tokenizer of {name} is {token}, and the model has {size} tokens. Take the "
                "tokenizer that belongs to the model."
            )
    if len(tokenizer) > size:
        log.warning("The tokenizer of %s has %d tokens, and the model only %d.", name, len(tokenizer), size)


def lora(config: Config) -> Any:
    """PEFT's configuration of `lora`, None without."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def demo_config() -> Qwen3MoeConfig:
    """A Qwen3-MoE of about 2 million weights for the built-in tokenizer: small, and every part of the family in it."""
    tokenizer = data.demo_tokenizer()
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]
        max_position_embeddings=2048,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        initializer_range=0.06,  # the usual 0.02 is for widths of thousands: at 128 signals would start too small
        tie_word_embeddings=True,
    )


def unreachable(name: str, what: str, error: Exception) -> ConfigError:
    """The error for a part of a model that could not be loaded."""
    why = in_short(error)
    if Path(name).is_dir():
        return ConfigError(f"model.name: the {what} in the folder {name} cannot be read: {why}.")
    if Path(name).exists():
        return ConfigError(f"model.name: {name} is no folder. Name the folder of a model, with its config.json.")
    if name.startswith((".", "/")) or name.count("/") > 1:
        return ConfigError(f"model.name: the folder {name} does not exist. Check the spelling, or name a Hub id.")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    kind = Unreachable if offline or "couldn't connect" in str(error) else ConfigError
    if offline:
        why = "it is not in the cache, and HF_HUB_OFFLINE forbids fetching it"
    return kind(
        f"model.name: there is no folder {name!r} here, and as a Hugging Face id its {what} cannot be had: {why}. "
        f"Check the spelling, name a local folder, run `hf download {name}` where there is a network, or use `demo`."
    )
