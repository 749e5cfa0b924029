"""Which tokens are supervised, and the errors if none are.

A chat template without a generation block gives an all-zero assistant mask, every label becomes -100, and the run looks
healthy while it learns nothing. That is an error: before the first step it is found in the rows
(train/conversations.py), then at each step (train/guard.py).
"""

IGNORED = -100  # the label that the loss ignores, as in Transformers

REMEDY = (
    "Assistant-only labels need a chat template that wraps the assistant's text in "
    "{% generation %} ... {% endgeneration %}; the templates that most models ship do not. "
    "Set a tokenizer.chat_template that has the block, or train on every token (assistant_only_loss off), "
    "and see that the data has assistant turns which are not cut off by the maximum length."
)
