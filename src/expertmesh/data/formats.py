"""Formats of training rows, and their conversion to formats that TRL trains on.

Three are TRL's own and stay: `text`, `messages` and `prompt` with `completion`. Two are converted to `messages`: alpaca
(`instruction`, optional `input` and `system`, `output`) and sharegpt (`conversations` of `from` and `value`).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Turn = dict[str, Any]

ACCEPTED = (
    "text: `text` (a string); chat: `messages` (a list of {role, content}); `prompt` with `completion`; "
    "alpaca: `instruction`, `output`, optionally `input` and `system`; "
    "sharegpt: `conversations` (a list of {from, value})"
)
# Columns that are kept. The trainer does not read any others.
COLUMNS = {
    "messages": ("messages", "tools", "chat_template_kwargs"),
    "conversations": ("conversations", "tools", "chat_template_kwargs"),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output", "system"),
    "text": ("text",),
}
NEEDED = {"prompt": {"prompt", "completion"}, "instruction": {"instruction", "output"}}
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}


def detect_format(columns: Iterable[str]) -> str | None:
    """Return the first key of COLUMNS whose columns are all present, or None."""
    names = set(columns)
    return next((kind for kind in COLUMNS if NEEDED.get(kind, {kind}) <= names), None)


def to_standard(dataset: "Dataset", source: str, plain: Path | None = None) -> "Dataset":
    """The dataset with the columns `text`, or `messages` (and `tools`), or `prompt` and `completion`, and no others.

    `source` names the dataset in errors. Every row is looked at: parts of a content become one text, and a turn of the
    assistant that calls tools may do without. Raises ValueError if the dataset is empty or has no usable column, or a
    row (counted from 0) holds something else than its column's name promises.

    plain: a file of JSON with the same rows, to be read here. Where a column holds texts and lists, `datasets` takes a
    text for the JSON that it may be: "0" becomes a number.
    """
    columns = dataset.column_names
    kind = detect_format(columns)
    if kind is None:
        hint = ""
        if {"chosen", "rejected"} <= set(columns):
            hint = " `chosen` and `rejected` are preference data, for TRL's DPOTrainer; fine-tuning uses one answer."
        raise ValueError(
            f"{source} has no column to train on: it has {', '.join(f'`{name}`' for name in columns) or 'none'}.{hint} "
            f"Rename or make one of these: {ACCEPTED}."
        )
    if not len(dataset):
        raise ValueError(f"{source} has no rows. Give a file or split that has some.")
    dataset = dataset.select_columns([name for name in COLUMNS[kind] if name in columns])
    rows: Callable[[], Iterator[Row]] = dataset.__iter__
    if plain is not None:  # the file's time invalidates the cache of `datasets`
        rows = partial(_json_rows, plain, dataset.column_names, plain.stat().st_mtime_ns)
    changes = plain is not None
    for number, row in enumerate(rows()):
        try:
            changes |= _standard(row) != row
        except ValueError as error:
            raise ValueError(f"{source}: row {number} {error} Accepted are {ACCEPTED}.") from None
    # not `map`, which would cast the results to the old column types
    return type(dataset).from_generator(_standard_rows, gen_kwargs={"rows": rows}) if changes else dataset


def _json_rows(path: Path, names: list[str], changed: int) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        listed = lines.read(1) == "["
        lines.seek(0)
        for row in json.load(lines) if listed else (json.loads(line) for line in lines if line.strip()):
            yield {name: row.get(name) for name in names}


def _standard_rows(rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    yield from map(_standard, rows())


def _standard(row: Row) -> Row:
    """Return the row in TRL's format. The ValueError of a bad row is the end of a sentence that begins with the row."""
    if "conversations" in row:
        kept = {name: value for name, value in row.items() if name != "conversations"}
        return _standard({"messages": _speakers(row["conversations"]), **kept})
    if "instruction" in row:
        question = "\n\n".join(_text(row, name) for name in ("instruction", "input") if row.get(name))
        system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
        answer = {"role": "assistant", "content": _text(row, "output")}
        return {"messages": [*system, {"role": "user", "content": question}, answer]}
    if "text" in row:
        return {"text": _text(row, "text")}
    if "prompt" in row:
        talks = [isinstance(row[name], list) for name in COLUMNS["prompt"]]
        if any(talks) and not all(talks):
            raise ValueError("has turns in one of `prompt` and `completion`, and something else in the other.")
        return {name: _turns(row, name) if all(talks) else _text(row, name) for name in COLUMNS["prompt"]}
    done = {**row, "messages": _turns(row, "messages")}
    if isinstance(tools := row.get("tools"), str):
        try:
            json.loads(tools)
        except ValueError as error:
            raise ValueError(f"has `tools` that are not JSON ({error}).") from None
    if row.get("chat_template_kwargs", {}) is None:
        done["chat_template_kwargs"] = {}
    return done


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"has a column `{name}` that is no text, but {_shown(row[name])}.")
    return row[name]


def _turns(row: Row, name: str) -> list[Turn]:
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"has a column `{name}` that is no list of turns, but {_shown(turns)}.")
    return [_turn(turn, f"`{name}`, turn {number}") for number, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(f"has a turn without a role ({where}): {_shown(turn)}.")
    content = turn.get("content")
    if isinstance(content, str):
        return turn
    if isinstance(content, list) and content:
        return {**turn, "content": "".join(_part(part, where) for part in content)}
    if content is None and turn.get("tool_calls"):
        return {**turn, "content": ""}
    raise ValueError(f"has a turn without text ({where}): {_shown(turn)}.")


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"has a part of a content that is no text ({where}): {_shown(part)}.")


def _speakers(turns: Any) -> Any:
    """Convert ShareGPT's turns to {role, content}. Anything else is returned as it is, and `_turns` refuses it."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    spoken = []
    for turn in turns:
        name, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if name not in ROLES:
            raise ValueError(f"has a turn from {name!r}. Rename it to one of {', '.join(ROLES)}.")
        spoken.append({"role": ROLES[name], "content": value})
    return spoken


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
