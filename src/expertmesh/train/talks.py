"""Rows against the tokenizer and its chat template, before the model is loaded: one of each shape is rendered."""

import json
from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from expertmesh import data
from expertmesh.data.formats import ROLES as KNOWN
from expertmesh.train.config import Config, ConfigError
from expertmesh.train.errors import in_short

ROLES = tuple(dict.fromkeys(KNOWN.values()))  # others are right where the template names them


def check_rows(config: Config, tokenizer: PreTrainedTokenizerBase, rows: Any, source: str) -> None:
    """Raises ConfigError if rows cannot become tokens, or nothing of them would be learned. Rows count from 0."""
    talks = is_talk(rows[0])
    if talks and not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer of {config.model.name} has no chat template, so the conversations of {source} "
            "cannot become tokens. Take the instruction-tuned model, or data with `text`, or `prompt` and `completion`."
        )
    if not talks and config.data.assistant_only_loss:
        raise ConfigError(
            f"data.assistant_only_loss: {source} has no conversations, so no assistant speaks in it. Remove the key."
        )
    if not talks and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of {config.model.name} has no eos_token, which ends every row of {source}. Set "
            "it in its tokenizer_config.json."
        )
    template = _training_template(config, tokenizer) if config.data.assistant_only_loss else None
    strangers: Counter[str] = Counter()
    silent, shapes, learns = [], set(), False
    for number, row in enumerate(rows):
        if talks:
            turns = _turns(row)
            strangers.update(turn["role"] for turn in turns if turn["role"] not in ROLES)
            if not any(turn["role"] == "assistant" for turn in turns):
                silent.append(number)
            shape = (*((turn["role"], bool(turn["content"]), bool(turn.get("tool_calls"))) for turn in turns),)
            if shape not in shapes:
                shapes.add(shape)
                _render(config, tokenizer, row, f"row {number} of {source}", template)
        learns = learns or _is_learned(config, tokenizer, row, template)
    _check_speakers(config, tokenizer, strangers, silent, source)
    if not learns:
        raise ConfigError(
            f"Nothing of {source} is left to train on: all labels are masked, because no example has a token "
            f"to learn within data.max_length={config.data.max_length}. Raise it, or look at the answers in the data."
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


def _training_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that marks what the assistant says: None for the tokenizer's own, or TRL's in its place."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        marked = has_generation_markers(tokenizer.chat_template)
        return None if marked else get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"data.assistant_only_loss: the chat template of {config.model.name} does not mark what the assistant "
            f"says, and TRL knows no other for it. {data.REMEDY}"
        ) from error


def _options(row: dict[str, Any], template: str | None) -> dict[str, Any]:
    """How TRL calls the template for a row."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"chat_template": template, "tools": tools, **row.get("chat_template_kwargs", {})}


def _render(
    config: Config, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], where: str, template: str | None
) -> None:
    try:
        if "prompt" in row:
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(_turns(row), tokenize=False, **_options(row, template))
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise ConfigError(
            f"data.name: the chat template of {config.model.name} refuses {where}: {in_short(error)}. Change "
            "such rows, or take a model whose template knows them."
        ) from error
    for turn in _turns(row):
        for call in turn.get("tool_calls") or ():
            name = call.get("function", call).get("name")
            if not name or name not in str(text):
                raise ConfigError(
                    f"data.name: the chat template of {config.model.name} leaves out calls of tools ({where}). Take a "
                    "model whose template has them, or remove such rows."
                )


def _is_learned(config: Config, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str | None) -> bool:
    """Whether a label of the row is left within `data.max_length`."""
    length = config.data.max_length
    if "prompt" in row:
        if not is_talk(row):
            return len(tokenizer(row["prompt"])["input_ids"]) < length
        said: Any = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        return len(said["input_ids"]) < length
    if not config.data.assistant_only_loss:
        return True
    options = _options(row, template) | {"return_dict": True, "return_assistant_tokens_mask": True}
    said = tokenizer.apply_chat_template(row["messages"], **options)
    return 1 in said["assistant_masks"][:length]


def _check_speakers(
    config: Config, tokenizer: PreTrainedTokenizerBase, strangers: Counter[str], silent: list[int], source: str
) -> None:
    template = str(tokenizer.chat_template)
    unknown = [role for role in strangers if not any(f"{q}{role}{q}" in template for q in "'\"")]
    if unknown:
        counted = ", ".join(f"{role!r} ({strangers[role]} turns)" for role in unknown)
        raise ConfigError(
            f"data.name: {source} has turns of {counted}, and the chat template of {config.model.name} names no such "
            f"role. Rename them to one of {', '.join(ROLES)}."
        )
    if silent and config.data.assistant_only_loss:
        raise ConfigError(
            f"data.assistant_only_loss: {len(silent)} conversations of {source} have no turn of the assistant, so all "
            f"their labels are masked; the first is row {silent[0]}. Remove them."
        )
