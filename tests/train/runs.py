"""A run that takes a second: a tiny Qwen3-MoE with the built-in tokenizer, and a few rows, made once per process."""

import functools
import json
import tempfile
from pathlib import Path

from expertmesh.bench.tiny import tiny_model
from expertmesh.data import demo_tokenizer

_FOLDER = tempfile.TemporaryDirectory(prefix="expertmesh-runs-")


@functools.cache
def checkpoint(**sizes: int) -> Path:
    """A folder with a tiny model, of such sizes, and its tokenizer. Do not write into it."""
    tokenizer = demo_tokenizer()
    folder = Path(_FOLDER.name, "-".join(["model", *map(str, sizes.values())]))
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model("qwen3_moe", vocab_size=len(tokenizer), **tokens, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int = 40) -> list[dict]:
    """Conversations of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Count to {i % 7}."},
                {"role": "assistant", "content": " ".join(map(str, range(i % 7 + 1)))},
            ]
        }
        for i in range(count)
    ]


@functools.cache
def data_file() -> Path:
    """`rows()` as a jsonl file."""
    path = Path(_FOLDER.name, "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def tiny_run(output_dir: Path, **changes: object) -> list[str]:
    """Overrides that make the built-in configuration such a run; `changes` are more of them, with `__` for the dot."""
    settings = {
        "model.name": checkpoint(),
        "data.name": data_file(),
        "data.eval_fraction": 0.1,
        "train.max_steps": 4,
        "train.per_device_train_batch_size": 4,
        "log.logging_steps": 2,
        "save.output_dir": output_dir,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]
