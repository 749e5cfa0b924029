"""Training data of the loops in `loops.py`: random tokens and pairs of texts, the same in every arm.

Every function takes the number of rows, the tokens of a full row, and the size of the vocabulary.
"""

from typing import Any

import torch

from expertmesh.data import demo_tokenizer

SPECIAL = 8  # token ids below this may be special tokens such as padding
#: a document of a packed row has LONGEST * seq * u**3 tokens, u uniform in 0..1, but at least SHORTEST
SHORTEST, LONGEST = 8, 0.9


def whole(count: int, seq: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of seq tokens, all of them with labels."""
    generator = torch.Generator().manual_seed(1)
    rows = [_tokens(seq, vocab, generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def ragged(count: int, seq: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of seq / 4 to seq tokens, for a collator that pads."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(seq // 4, seq + 1, (count,), generator=generator).tolist()
    return [{"input_ids": _tokens(length, vocab, generator)} for length in lengths]


def whole_dataset(count: int, seq: int, vocab: int) -> Any:
    """Return the rows of `whole` as a tokenized dataset for TRL."""
    return _dataset({"input_ids": [row["input_ids"].tolist() for row in whole(count, seq, vocab)]})


def documents(count: int, seq: int, vocab: int) -> Any:
    """Return documents that fill `count` packed rows: many short ones, a few nearly as long as a row."""
    generator, found, filled = torch.Generator().manual_seed(1), [], 0
    while filled < count * seq:
        share = torch.rand((), generator=generator).item() ** 3
        found.append(_tokens(max(SHORTEST, int(LONGEST * seq * share)), vocab, generator).tolist())
        filled += len(found[-1])
    return _dataset({"input_ids": found})


def pairs(count: int, seq: int, vocab: int) -> Any:
    """Return preference pairs as text: a prompt of seq / 4 tokens and two answers of seq / 4 to 3/4 seq tokens each.

    The tokens are of the built-in tokenizer, whose vocabulary is smaller than that of any model in the benchmark.
    """
    tokenizer: Any = demo_tokenizer()
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return tokenizer.decode(_tokens(length, len(tokenizer), generator))

    found: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(count):
        found["prompt"].append(text(seq // 4))
        for side in ("chosen", "rejected"):
            length = torch.randint(seq // 4, seq * 3 // 4 + 1, (), generator=generator)
            found[side].append(text(int(length)))
    return _dataset(found)


def _tokens(length: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(SPECIAL, vocab, (length,), generator=generator)


def _dataset(columns: dict[str, list]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)
