"""The built-in tokenizer: 4,096 byte-level BPE tokens, learned once by scripts/build_tokenizer.py and frozen.

It is small enough for a model that trains in minutes, loses no byte of any text, and its chat template marks what the
assistant says with a generation block, so that only that is supervised.
"""

from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 4096


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The built-in tokenizer, loaded from the package: no network, no cache."""
    with resources.as_file(resources.files("expertmesh.data") / "tokenizer") as folder:
        return PreTrainedTokenizerFast.from_pretrained(Path(folder))
