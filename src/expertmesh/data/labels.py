"""What is supervised: refuses to train on nothing.

A chat template without a generation block gives an all-zero assistant mask, every label becomes -100, and the run looks
healthy while it learns nothing. The two checks here make that an error, one before the first step and one per batch.
"""

import re
from typing import Protocol

import torch

IGNORED = -100  # the label that the loss leaves out, as everywhere in Transformers

REMEDY = (
    "Assistant-only labels need a chat template that wraps the assistant's text in "
    "{% generation %} ... {% endgeneration %}; the templates that most models ship do not. "
    "Set a tokenizer.chat_template that has the block, or train on every token (assistant_only_loss off), "
    "and see that the data has assistant turns which are not cut off by the maximum length."
)


class _HasTemplate(Protocol):
    chat_template: str | None


def check_supervised(labels: torch.Tensor, where: str = "this batch") -> int:
    """The number of supervised labels in `labels` (any shape, -100 means ignored).

    Raises ValueError if there is none. Reads the labels: call it where they are still on the CPU.
    """
    supervised = int((labels != IGNORED).sum())
    if not supervised:
        raise ValueError(f"All {labels.numel()} labels of {where} are masked: there is nothing to learn from. {REMEDY}")
    return supervised


def check_template(tokenizer: _HasTemplate) -> None:
    """Raises ValueError if the chat template cannot mark assistant text, so that every label would be masked."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer has no chat template, so `messages` data cannot be turned into tokens. {REMEDY}"
        )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template):
        raise ValueError(
            f"The tokenizer's chat template has no {{% generation %}} block: all labels would be masked. {REMEDY}"
        )
