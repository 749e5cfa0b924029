"""What kernels are told about packed documents is the same however a collator tells it."""

import torch

from expertmesh.kernels.documents import document_numbers, document_starts


def test_starts_are_where_the_number_changes():
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 5], [3, 2, 2, 0, 0, 0]])
    assert document_starts(seq_idx).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]]


def test_starts_from_positions_are_those_from_lengths():
    rows = [[4, 1, 1, 6], [12]]
    positions = torch.stack([torch.cat([torch.arange(n) + 5 for n in row]) for row in rows])
    cu_seqlens = torch.tensor([0, *(n for row in rows for n in row)]).cumsum(0).int()
    expected = [[0] * 4 + [4] + [5] + [6] * 6, [0] * 12]
    for number in (torch.arange(12) - positions, document_numbers(cu_seqlens, 2, 12)):
        found = document_starts(number)
        assert found.tolist() == expected and found.dtype == torch.int32


def test_a_document_that_goes_on_in_the_next_row_is_cut_there():
    number = document_numbers(torch.tensor([0, 2, 7, 8], dtype=torch.int32), 2, 4)
    assert document_starts(number).tolist() == [[0, 0, 2, 2], [0, 0, 0, 3]]
