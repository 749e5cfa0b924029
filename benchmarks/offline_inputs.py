"""A model's folder without weights, and real text, of what every machine has: for runs that may not download anything.

    python benchmarks/offline_inputs.py FOLDER [--work qwen3-30b-a3b] [--layers 48]
    expertmesh train examples/one-gpu-full.yaml model.name=FOLDER/model data.name=FOLDER/text.jsonl data.packing=false

FOLDER/model: config.json with a published model's widths (expertmesh.bench.works), and the built-in tokenizer. Its
vocabulary is smaller than the model's. FOLDER/text.jsonl: the sources of this Python's standard library in pieces of
`--characters`, enough for more than 4,096 tokens each, so that every row of a batch is cut to `data.max_length`.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from expertmesh.bench.works import WORKS, config_of
from expertmesh.data import demo_tokenizer

LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def write_model(folder: Path, work: str, layers: int | None, tiny: bool = False) -> None:
    """config.json and tokenizer of a work."""
    tokenizer = demo_tokenizer()
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    size = {"vocab_size": len(tokenizer)} if tiny else {}
    config_of(WORKS[work], layers, tiny, dtype="bfloat16", **tokens, **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_text(file: Path, characters: int, limit: int | None = None) -> int:
    """Rows of text, at most `limit`, and how many they are."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]
    text = "".join(path.read_text("utf-8", errors="ignore") for path in sources)
    starts = range(0, len(text) - characters + 1, characters)[:limit]
    file.write_text("".join(json.dumps({"text": text[i : i + characters]}) + "\n" for i in starts))
    return len(starts)


def main() -> None:
    """Write both."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--work", choices=WORKS, default="qwen3-30b-a3b")
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--characters", type=int, default=20_000)
    options = options.parse_args()
    write_model(options.folder / "model", options.work, options.layers)
    count = write_text(options.folder / "text.jsonl", options.characters)
    print(f"{options.folder}/model, and {count} rows in {options.folder}/text.jsonl")


if __name__ == "__main__":
    main()
