"""The shapes a row of training data may have, and how each becomes one that TRL trains on.

Three are TRL's own and stay: `text`, `messages` and `prompt` with `completion`. Two are converted to `messages`: alpaca
(`instruction`, optional `input` and `system`, `output`) and sharegpt (`conversations` of `from` and `value`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Turn = dict[str, Any]

ACCEPTED = (
    "text: `text` (a string); chat: `messages` (a list of {role, content}); `prompt` with `completion`; "
    "alpaca: `instruction`, `output`, optionally `input` and `system`; "
    "sharegpt: `conversations` (a list of {from, value})"
)
# What a row keeps: everything else is metadata that the trainer would not look at.
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
    """The key of COLUMNS that these column names satisfy, the richest first, or None."""
    names = set(columns)
    return next((kind for kind in COLUMNS if NEEDED.get(kind, {kind}) <= names), None)


def to_standard(dataset: "Dataset", source: str) -> "Dataset":
    """The dataset with the columns `text`, or `messages` (and `tools`), or `prompt` and `completion`, and no others.

    `source` names the dataset in errors. Raises ValueError if it is empty, has no usable column, or has a turn of an
    unknown role.
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
    if kind == "conversations":
        return dataset.map(_from_sharegpt, fn_kwargs={"source": source}, remove_columns=["conversations"])
    if kind == "instruction":
        return dataset.map(_from_alpaca, remove_columns=dataset.column_names)
    _check_first_row(dataset[0], kind, source)
    return dataset


def _from_alpaca(row: dict[str, str | None]) -> dict[str, list[Turn]]:
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    answer = {"role": "assistant", "content": row["output"]}
    return {"messages": [*system, {"role": "user", "content": question}, answer]}


def _from_sharegpt(row: dict[str, list[Turn]], source: str) -> dict[str, list[Turn]]:
    turns = []
    for turn in row["conversations"]:
        name, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if name not in ROLES:
            raise ValueError(f"{source} has a turn from {name!r}. Rename it to one of {', '.join(ROLES)}.")
        turns.append({"role": ROLES[name], "content": content})
    return {"messages": turns}


def _check_first_row(row: dict[str, Any], kind: str, source: str) -> None:
    """A column of the right name may hold anything: look once, where the error can still say what was expected."""
    value = row[kind]
    turns = isinstance(value, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value
    )
    if not (turns and value if kind == "messages" else turns or isinstance(value, str)):
        raise ValueError(
            f"{source} has a column `{kind}`, but its first row is {str(value)[:80]!r}. Accepted are {ACCEPTED}."
        )
