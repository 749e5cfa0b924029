"""The built-in tokenizer: 4,096 byte-level BPE tokens, trained once by scripts/build_tokenizer.py.

It is small enough for a model that trains in minutes, loses no byte of any text, and its chat template marks what the
assistant says with a generation block, so that only that is supervised.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3MoeConfig

VOCABULARY = 4096

DEMO_FOLDER = Path(__file__).with_name("tokenizer")


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Load the built-in tokenizer from the package, without network or cache."""
    return PreTrainedTokenizerFast.from_pretrained(DEMO_FOLDER)


def demo_config() -> Qwen3MoeConfig:
    """Return the configuration of a Qwen3-MoE with about 2 million weights for this tokenizer.

    Its weights begin with a deviation of 0.06: the usual 0.02 is for widths of thousands.
    """
    return Qwen3MoeConfig.from_json_file(DEMO_FOLDER / "config.json")
