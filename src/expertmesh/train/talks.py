"""Rows against the tokenizer and its chat template, before the model is loaded: one of each shape is rendered."""

import json
from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from expertmesh import data
from expertmesh.data.formats import ROLES as KNOWN
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import refusing

ROLES = tuple(dict.fromkeys(KNOWN.values()))  # others are right where the template names them


def check_rows(config: Config, tokenizer: PreTrainedTokenizerBase, rows: Any, source: str) -> None:
    """Raises ConfigError if rows cannot become tokens, or nothing of them would be learned. Rows count from 0."""
    name, only, talks = config.model.name, config.data.assistant_only_loss, is_talk(rows[0])
    if talks and not tokenizer.chat_template:
        raise ConfigError(
            f"model.name: the tokenizer of {name} has no chat template, so the conversations of {source} cannot become "
            "tokens. Take the instruction-tuned model, or data with `text`, or `prompt` and `completion`."
        )
    if only and not talks:
        raise ConfigError(f"data.assistant_only_loss: {source} has no conversations. Remove the key.")
    if not talks and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of {name} has no eos_token, which ends every row of {source}. Set it in its "
            "tokenizer_config.json."
        )
    template = _training_template(name, tokenizer) if only else None
    strangers: Counter[str] = Counter()
    silent, masked, learns = [], dict[tuple, bool](), False
    for number, row in enumerate(rows):
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"chat_template": template, "tools": tools, **row.get("chat_template_kwargs", {})}  # as TRL has it
        if talks:
            turns = _turns(row)
            strangers.update(turn["role"] for turn in turns if turn["role"] not in ROLES)
            shape = (*((turn["role"], bool(turn["content"]), bool(turn.get("tool_calls"))) for turn in turns),)
            if shape not in masked:
                _render(name, tokenizer, row, options, f"row {number} of {source}")
                masked[shape] = only and 1 not in _assistant_mask(tokenizer, turns, options)
            if masked[shape]:
                silent.append(number)
        learns = learns or _is_learned(config, tokenizer, row, options)
    unknown = [role for role in strangers if not any(f"{q}{role}{q}" in str(tokenizer.chat_template) for q in "'\"")]
    if unknown:
        counted = ", ".join(f"{role!r} ({strangers[role]} turns)" for role in unknown)
        raise ConfigError(
            f"data.name: {source} has turns of {counted}, a role that the chat template of {name} lacks. Rename "
            f"it to one of {', '.join(ROLES)}."
        )
    if silent:
        raise ConfigError(
            f"data.assistant_only_loss: {len(silent)} conversations of {source} have no token of the assistant, so all "
            f"their labels are masked; the first is row {silent[0]}. Remove them, or answer there."
        )
    if not learns:
        raise nothing_learned(config, source)


def nothing_learned(config: Config, source: str) -> ConfigError:
    """The error for rows of which all labels are masked."""
    return ConfigError(
        f"data.max_length: nothing of {source} is left to train on: all labels are masked, because no example has a "
        f"token to learn within data.max_length={config.data.max_length}. Raise it, or look at the answers in the data."
    )


def is_talk(row: dict[str, Any]) -> bool:
    """Whether a row holds turns of a conversation."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def count_unlearned(rows: Any) -> int:
    """Of how many documents in TRL's packed rows no token is left to learn."""
    unlearned = 0
    for row in rows.with_format("numpy"):
        documents = np.split(row["labels"], np.cumsum(row["seq_lengths"])[:-1])
        unlearned += sum(bool((labels == data.IGNORED).all()) for labels in documents)
    return unlearned


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def _training_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that marks what the assistant says: None for the tokenizer's own, or TRL's in its place."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        marked = has_generation_markers(tokenizer.chat_template)
        return None if marked else get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"data.assistant_only_loss: the chat template of {name} does not mark what the assistant says, and TRL "
            f"knows no other for it. {data.REMEDY}"
        ) from error


def _render(name: str, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], options: dict, where: str) -> None:
    with refusing(f"data.name: the chat template of {name} refuses {where}. Change such rows, or the model"):
        if "prompt" in row:
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        text = str(tokenizer.apply_chat_template(_turns(row), tokenize=False, **options))
    calls = [call.get("function", call).get("name") for turn in _turns(row) for call in turn.get("tool_calls") or ()]
    if not all(call and call in text for call in calls):
        raise ConfigError(
            f"data.name: the chat template of {name} leaves out calls of tools ({where}). Take a model whose template "
            "has them, or remove such rows."
        )


def _is_learned(config: Config, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], options: dict) -> bool:
    """Whether a label of the row is left within `data.max_length`."""
    length = config.data.max_length
    encode: Any = tokenizer.apply_chat_template if is_talk(row) else tokenizer
    if "prompt" in row:
        options = {"add_generation_prompt": True, "return_dict": True} if is_talk(row) else {}
        return len(encode(row["prompt"], **options)["input_ids"]) < length
    if not config.data.assistant_only_loss:
        return True
    return 1 in _assistant_mask(tokenizer, row["messages"], options)[:length]


def _assistant_mask(tokenizer: Any, turns: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    """1 for each token that the assistant says."""
    how = options | {"return_dict": True, "return_assistant_tokens_mask": True}
    return tokenizer.apply_chat_template(turns, **how)["assistant_masks"]
