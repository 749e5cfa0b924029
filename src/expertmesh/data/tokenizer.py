"""The built-in tokenizer: 4,096 byte-level BPE tokens, learned once by scripts/build_tokenizer.py and frozen.

It is small enough for a model that trains in minutes, loses no byte of any text, and its chat template marks what the
assistant says with a generation block, so that only that is supervised.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3MoeConfig

VOCABULARY = 4096

DEMO_FOLDER = Path(__file__).with_name("tokenizer")


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The built-in tokenizer, loaded from the package: no network, no cache."""
    return PreTrainedTokenizerFast.from_pretrained(DEMO_FOLDER)


def demo_config() -> Qwen3MoeConfig:
    """A Qwen3-MoE of about 2 million weights for this tokenizer: small, and every part of the family in it.

    Its weights begin with a deviation of 0.06: the usual 0.02 is for widths of thousands.
    """
    return Qwen3MoeConfig.from_json_file(DEMO_FOLDER / "config.json")
