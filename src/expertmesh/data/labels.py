"""What is supervised: refuses to train on nothing.

A chat template without a generation block gives an all-zero assistant mask, every label becomes -100, and the run looks
healthy while it learns nothing. That is an error: before the first step by the rows (train/talks.py), then per batch.
"""

import torch

IGNORED = -100  # the label that the loss leaves out, as everywhere in Transformers

REMEDY = (
    "Assistant-only labels need a chat template that wraps the assistant's text in "
    "{% generation %} ... {% endgeneration %}; the templates that most models ship do not. "
    "Set a tokenizer.chat_template that has the block, or train on every token (assistant_only_loss off), "
    "and see that the data has assistant turns which are not cut off by the maximum length."
)


def check_supervised(labels: torch.Tensor, where: str = "this batch") -> int:
    """The number of supervised labels in `labels` (any shape, -100 means ignored).

    Raises ValueError if there is none. Reads the labels: call it where they are still on the CPU.
    """
    supervised = int((labels != IGNORED).sum())
    if not supervised:
        raise ValueError(f"All {labels.numel()} labels of {where} are masked: there is nothing to learn from. {REMEDY}")
    return supervised
