"""Training on nothing is refused."""

import pytest
import torch

from expertmesh.data import check_supervised


def test_the_number_of_supervised_labels_is_returned():
    assert check_supervised(torch.tensor([[-100, 5, 7], [-100, -100, 0]])) == 3


def test_an_all_masked_batch_is_an_error_that_names_the_fix():
    with pytest.raises(
        ValueError, match=r"All 8 labels of batch 3 are masked.*\{% generation %\}.*chat_template"
    ) as error:
        check_supervised(torch.full((2, 4), -100), where="batch 3")
    assert "\n" not in str(error.value)
