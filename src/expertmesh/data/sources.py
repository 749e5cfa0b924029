"""Load rows by name: built-in data, local files and folders, and datasets on the Hugging Face Hub."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertmesh.data.demo import all_dialogues, chat_dialogues, python_dialogues
from expertmesh.data.formats import to_standard

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = {"demo:chat": chat_dialogues, "demo:python": python_dialogues, "demo:all": all_dialogues}
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


class Unreachable(ValueError):
    """Raised for a dataset on the Hub if there is no network, or offline mode is on."""


def load_dataset(
    source: str | Sequence[str], split: str = "train", seed: int = 0, *, name: str | None = None
) -> "Dataset":
    """Load the rows of one source, or of several concatenated, in one of the standard formats (formats.py).

    source  `demo:chat`, `demo:python`, `demo:all`; a json, jsonl, csv, parquet, arrow or txt file (txt: one row per
            paragraph); a folder of such files or one that `Dataset.save_to_disk` wrote; the id of a dataset on the Hub
    split   the split to read, for sources that have splits; a file or a built-in source is all `train`
    seed    orders the built-in sources
    name    the configuration of a Hub dataset that has several

    Raises ValueError if the source does not exist, cannot be read, has no usable column or a row of another format; the
    message names the fix. Raises Unreachable if the source is on the Hub and the Hub cannot be reached.
    """
    if not isinstance(source, str):
        return _concatenate([(one, load_dataset(one, split, seed, name=name)) for one in source])
    dataset, path = _read(source, split, seed, name), Path(source).expanduser()
    mixed = path.suffix in (".json", ".jsonl") and path.is_file() and "Json(" in str(dataset.features)
    return to_standard(dataset, f"The dataset {source!r}", path if mixed else None)


def hold_out(dataset: "Dataset", fraction: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
    """Return (training rows, held-out rows). About `fraction` of the rows is held out, at least one.

    Rows are chosen by a hash of the seed and of their question (or text): the choice depends neither on the order nor
    on other rows, and no question is on both sides. Raises ValueError if one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The held-out fraction must lie between 0 and 1, and is {fraction}.")
    keys = [_key(row, seed) for row in dataset]
    limit = sorted(keys)[max(1, round(len(keys) * fraction)) - 1]
    rest = [i for i, key in enumerate(keys) if key > limit]
    if not rest:
        raise ValueError(
            f"The dataset has too few different rows ({len(set(keys))}) to hold any out: give more rows, "
            "or no held-out fraction."
        )
    return dataset.select(rest), dataset.select([i for i, key in enumerate(keys) if key <= limit])


def _key(row: dict[str, Any], seed: int) -> str:
    question = row.get("text") or row.get("prompt")
    if question is None:
        turns = row["messages"]
        question = next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])
    return hashlib.sha256(f"{seed}:{json.dumps(question, sort_keys=True)}".encode()).hexdigest()


def _concatenate(parts: list[tuple[str, "Dataset"]]) -> "Dataset":
    from datasets import concatenate_datasets

    if not parts:
        raise ValueError("No dataset was given. Name at least one, such as demo:chat.")
    shapes = {source: ", ".join(sorted(dataset.column_names)) for source, dataset in parts}
    if len(set(shapes.values())) > 1:
        found = "; ".join(f"{source} has {columns}" for source, columns in shapes.items())
        raise ValueError(
            f"Datasets that are trained together must have the same columns: {found}. Convert one of them."
        )
    return concatenate_datasets([dataset for _, dataset in parts])


def _read(source: str, split: str, seed: int, name: str | None) -> "Dataset":
    import datasets

    if source.startswith("demo:"):
        if source not in BUILT_IN:
            raise ValueError(f"There is no built-in dataset {source!r}. There are {', '.join(BUILT_IN)}.")
        _only_train(source, split, name)
        return datasets.Dataset.from_list(BUILT_IN[source](seed))
    path = Path(source).expanduser()
    if path.is_file():
        _only_train(source, split, name)
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    if path.exists():
        raise ValueError(
            f"{source!r} is neither a file nor a folder, but a device or a pipe. Write the rows to a file."
        )
    if path.suffix in BUILDERS or source.startswith((".", "/", "~")):
        raise ValueError(f"The data file {source!r} does not exist.{_nearest(path)}")
    return _read_hub(source, split, name)


def _only_train(source: str, split: str, name: str | None) -> None:
    """Raise ValueError for another split than `train`: evaluation on the training rows would look like success."""
    if split != "train" or name is not None:
        asked = f"split {split!r}" if split != "train" else f"configuration {name!r}"
        raise ValueError(
            f"{source!r} has no {asked}: a file is all `train`. Leave it out, hold rows out by a fraction, or name a "
            "folder in which every split has a file."
        )


def _read_file(path: Path) -> "Dataset":
    import datasets

    if path.suffix not in BUILDERS:
        raise ValueError(f"The data file {path} ends in {path.suffix!r}. Readable are {', '.join(BUILDERS)}.")
    if not path.stat().st_size:
        raise ValueError(f"The data file {path} is empty. Give one that has rows.")
    if path.suffix == ".txt":
        return datasets.Dataset.from_dict({"text": _paragraphs(path)})
    try:
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the readers of six formats raise different errors
        raise ValueError(
            f"The data file {path} cannot be read as {path.suffix[1:]}: {_cause(error)} "
            f"Mend the file, or give it the ending of what it is ({', '.join(BUILDERS)})."
        ) from error


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The data file {path} is not UTF-8 text: {error}. Convert it, for example with iconv."
        ) from error
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _read_folder(path: Path, split: str) -> "Dataset":
    import datasets

    if (path / "state.json").exists():
        return datasets.load_from_disk(path)
    try:
        return datasets.load_dataset(str(path), split=split)
    except Exception as error:
        raise ValueError(
            f"The folder {path} cannot be read as a dataset with the split {split!r}: {_cause(error)} It should "
            f"hold files of one kind ({', '.join(BUILDERS)}), their names telling the split, or be what "
            "`Dataset.save_to_disk` wrote."
        ) from error


def _read_hub(source: str, split: str, name: str | None) -> "Dataset":
    import datasets

    try:
        return datasets.load_dataset(source, name, split=split)
    except Exception as error:
        offline = datasets.config.HF_HUB_OFFLINE or isinstance(error, ConnectionError)
        raise (Unreachable if offline else ValueError)(
            f"{source!r} is no file or folder here, and reading it from the Hugging Face Hub (split {split!r}) failed: "
            f"{_cause(error)} Check the spelling and the split; for a private dataset log in with `hf auth login`; "
            f"without a network give a local file, or one of {', '.join(BUILT_IN)}."
        ) from error


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost exception of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" Neither does the folder {folder}."
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f" Did you mean {folder / close[0]}?" if close else f" The folder {folder.resolve()} has no such file."
