"""Check the rows with the tokenizer and its chat template before the model is loaded; render one of each shape."""

import json
import re
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from expertmesh import data
from expertmesh.data.formats import ROLES
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import as_config_error


def check_rows(config: Config, tokenizer: PreTrainedTokenizerBase, rows: Any, source: str) -> None:
    """Raise ConfigError if a row cannot be tokenized or no row has a label. Messages number rows from 0."""
    name, only = config.model.name, config.data.assistant_only_loss
    is_chat = "messages" in rows[0] or isinstance(rows[0].get("prompt"), list)
    needed = "chat_template" if is_chat else "eos_token"
    if not getattr(tokenizer, needed):
        raise ConfigError(
            f"model.name: the tokenizer of {name} has no {needed}, which every row of {source} needs. Take the "
            "instruction-tuned model, or set it in its tokenizer_config.json."
        )
    if only and not is_chat:
        raise ConfigError(f"data.assistant_only_loss: {source} has no conversations. Remove the key.")
    template = _training_template(name, tokenizer) if only else None
    quoted = re.findall(r"(?<=['\"])[\w-]+(?=['\"])", str(tokenizer.chat_template))  # includes the template's roles
    shapes, has_labels = set[tuple](), False
    for number, row in enumerate(rows):
        turns = [] if not is_chat else row.get("messages") or row["prompt"] + row["completion"]
        shape = (*((turn["role"], bool(turn["content"]), bool(turn.get("tool_calls"))) for turn in turns),)
        if has_labels and shape in shapes:
            continue
        shapes.add(shape)
        where = f"row {number} of {source}"
        if unknown := {turn["role"] for turn in turns}.difference(ROLES.values(), quoted):
            raise ConfigError(
                f"data.name: {where} has a turn of {min(unknown)!r}, which the chat template of {name} lacks. Rename "
                f"that role to one of {', '.join(dict.fromkeys(ROLES.values()))}."
            )
        tools = json.loads(given) if isinstance(given := row.get("tools"), str) else given
        options = {"chat_template": template, "tools": tools, **row.get("chat_template_kwargs", {})}  # as in TRL
        with as_config_error(f"data.name: the chat template of {name} refuses {where}. Change such rows, or the model"):
            first = _first_learned(tokenizer, row, turns, options, only)
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, **options)) if is_chat else ""
        calls = [call.get("function", call).get("name") for turn in turns for call in turn.get("tool_calls") or ()]
        if not all(call and call in text for call in calls):
            raise ConfigError(
                f"data.name: the chat template of {name} leaves out calls of tools ({where}). Take a model whose "
                "template has them, or remove such rows."
            )
        if first is None:
            raise ConfigError(
                f"data.assistant_only_loss: {where} has no token of the assistant, so its labels are all masked. "
                "Answer there, or remove such rows."
            )
        has_labels |= first < config.data.max_length
    if not has_labels:
        raise nothing_learned(config, source)


def nothing_learned(config: Config, source: str) -> ConfigError:
    """Return the error for a data set whose labels are all masked."""
    return ConfigError(
        f"data.max_length: nothing of {source} is left to train on: all labels are masked, because no example has a "
        f"token to learn within data.max_length={config.data.max_length}. Raise it, or check the answers in the data."
    )


def count_unlearned(rows: Any) -> int:
    """Return the number of documents in TRL's packed rows whose labels are all masked."""
    rows = rows.with_format("numpy")
    documents = (np.split(row["labels"], np.cumsum(row["seq_lengths"])[:-1]) for row in rows)
    return sum(bool((labels == data.IGNORED).all()) for row in documents for labels in row)


def _training_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's chat template that marks the assistant's tokens; None if the tokenizer's own template marks them."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    unmarked = f"the chat template of {name} does not mark what the assistant says, so remove the key"
    with as_config_error(f"data.assistant_only_loss: {unmarked}"):
        return get_training_chat_template(tokenizer)


def _first_learned(tokenizer: Any, row: dict[str, Any], turns: list, options: dict[str, Any], only: bool) -> int | None:
    """Return the index of a row's first labelled token, before truncation; None without one. turns: [] for text."""
    start, options = 0, options | {"return_dict": True}
    if "prompt" in row:
        encode = partial(tokenizer.apply_chat_template, add_generation_prompt=True, **options) if turns else tokenizer
        start = len(encode(row["prompt"])["input_ids"])
    if not only:
        return start
    mask = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, **options)["assistant_masks"]
    return next((index for index, is_assistant in enumerate(mask) if is_assistant and index >= start), None)
