"""The built-in tokenizer: frozen, lossless, and it marks what the assistant says."""

import hashlib
from importlib import resources

import pytest
from transformers import AutoTokenizer

from expertmesh.data import demo_config, demo_tokenizer
from expertmesh.data.demo import chat_dialogues

TALK = [
    {"role": "user", "content": "Tell me a joke."},
    {"role": "assistant", "content": "I failed math so many times at school, I can't even count."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Fine."},
]


def test_it_is_frozen():
    folder = resources.files("expertmesh.data") / "tokenizer"
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == "003f245a686a60cbb9e9eed3bf845e8fd51e807be3451351e5cd2be58d9cbfb7"
    assert len((folder / "tokenizer.json").read_bytes()) < 400_000


def test_it_has_4096_tokens_and_distinct_special_ones():
    tokenizer = demo_tokenizer()
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(demo_config(), name) == getattr(tokenizer, name)
    assert demo_config().vocab_size == 4096


@pytest.mark.parametrize(
    "text", ["", " two  spaces\n\ttab ", "naïve café 你好 🙂 \x00", "def f(x):\n    return x**2\n"]
)
def test_no_byte_of_any_text_is_lost(text):
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_mask_covers_what_the_assistant_says_and_its_end_of_turn():
    tokenizer = demo_tokenizer()
    encoded = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == TALK[1]["content"] + "<|im_end|>" + TALK[3]["content"] + "<|im_end|>"


def test_a_generation_prompt_is_the_beginning_of_the_answered_dialogue():
    tokenizer = demo_tokenizer()
    for row in chat_dialogues()[:50]:
        question, whole = row["messages"][:1], row["messages"][:2]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"][: len(prompt)] == prompt


def test_it_survives_save_and_autotokenizer(tmp_path):
    demo_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(TALK, tokenize=False) == demo_tokenizer().apply_chat_template(TALK, tokenize=False)
    assert "{%- generation %}" in again.chat_template
