"""The key that somebody meant who wrote another: by its words, its first letters, or what other tools call it."""

import difflib
from collections.abc import Sequence

#: what other tools call a key, where no word of that name leads to ours
ELSEWHERE = {
    "data_path": "data.name",
    "dataset": "data.name",
    "expert_parallel_size": "parallel.ep_size",
    "flash_attention": "model.attn_implementation",
    "gpus": "parallel.nproc",
    "gradient_checkpointing": "train.activation_checkpointing",
    "mixed_precision": "train.bf16",
    "model_name_or_path": "model.name",
    "rank": "lora.r",
    "seq_length": "data.max_length",
    "sequence_length": "data.max_length",
    "tensor_parallel_size": "parallel.tp_size",
    "wandb": "log.report_to",
}


def nearest(key: str, keys: Sequence[str]) -> str | None:
    """Which of the dotted `keys` is meant by `key`, which is none of them; None if it is like no other."""
    section, _, leaf = key.rpartition(".")
    same = [known for known in keys if _leaf(known) == leaf]
    alike = [known for known in keys if _alike(leaf.lower(), known)]
    alike.sort(key=lambda known: (not known.startswith(f"{section}."), known.count("_")))
    leaves = {_leaf(known): known for known in reversed(keys)}
    sections = {known.partition(".")[0]: known for known in reversed(keys)}
    found = (
        difflib.get_close_matches(key, same, n=1, cutoff=0.0)
        or _close(leaf, ELSEWHERE, 0.85)
        or alike
        or _close(leaf, leaves, 0.6)
        or ([] if section else _close(leaf, sections, 0.6))
    )
    return found[0] if found else None


def _close(name: str, known: dict[str, str], cutoff: float) -> list[str]:
    return [known[close] for close in difflib.get_close_matches(name, known, n=1, cutoff=cutoff)]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(given: str, known: str) -> bool:
    """Whether `given` is `known` by its first letters (lr), or each of its words begins or continues one of `known`."""
    words, parts, everywhere = given.split("_"), _leaf(known).split("_"), known.replace(".", "_").split("_")
    if len(given) > 1 and given == "".join(part[0] for part in parts):
        return True
    about = any(_begins(word, part) for word in words for part in parts)
    return about and all(any(_begins(word, part) for part in everywhere) for word in words)


def _begins(word: str, part: str) -> bool:
    shorter, longer = sorted((word, part), key=len)
    return word == part or len(shorter) > 2 and longer.startswith(shorter)
