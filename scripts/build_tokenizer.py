"""Learn the built-in tokenizer from demo:chat, demo:python and the whole of pydoc_data.topics, and write its files.

It was run once, on Python 3.11; the files it wrote are frozen, because every model trained with them depends on them.

    PYTHONPATH=src python scripts/build_tokenizer.py src/expertmesh/data/tokenizer
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expertmesh.data.demo import chat_dialogues, python_dialogues
from expertmesh.data.tokenizer import VOCABULARY

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def main(folder: str) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder, which has the chat_template.jinja."""
    turns = [turn["content"] for row in chat_dialogues() + python_dialogues() for turn in row["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user assistant system\n"] * 200  # every turn begins with one: worth a token each
    tokenizer.train_from_iterator(turns + [topics[name] for name in sorted(topics)] + roles, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = Path(folder, "chat_template.jinja").read_text()
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
