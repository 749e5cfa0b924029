"""Training on nothing is refused."""

import pytest
import torch

from expertmesh.data import check_supervised, check_template, demo_tokenizer


def test_the_number_of_supervised_labels_is_returned():
    assert check_supervised(torch.tensor([[-100, 5, 7], [-100, -100, 0]])) == 3


def test_an_all_masked_batch_is_an_error_that_names_the_fix():
    with pytest.raises(
        ValueError, match=r"All 8 labels of batch 3 are masked.*\{% generation %\}.*chat_template"
    ) as error:
        check_supervised(torch.full((2, 4), -100), where="batch 3")
    assert "\n" not in str(error.value)


def test_a_template_without_a_generation_block_is_an_error():
    tokenizer = demo_tokenizer()
    check_template(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="no {% generation %} block"):
        check_template(tokenizer)


def test_a_tokenizer_without_a_template_is_an_error():
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_template(tokenizer)
