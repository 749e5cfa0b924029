"""What is sent ahead is the first part of the next exchange, and is sent once."""

import pytest
import torch

from expertmesh.dispatch.links import Mailboxes


class Group:
    def rank(self):
        return 0

    def size(self):
        return 2


class Memory:
    """Two ranks' boxes in this process; what a rank that is not there would write stays zero."""

    def __init__(self, num_bytes):
        self.boxes = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2)]

    def of(self, rank):
        return self.boxes[rank]

    def barrier(self):
        pass


@pytest.fixture
def mailboxes():
    return Mailboxes(Group(), Memory)


def test_rows_sent_ahead_are_not_sent_again(mailboxes):
    x, ids = torch.ones(4, 32), torch.arange(4)
    mailboxes.all_gather([x, ids])  # makes boxes large enough
    turn = mailboxes.turn
    mailboxes.send_ahead(x)
    x.fill_(2)
    got, got_ids = mailboxes.all_gather([x, ids])
    assert mailboxes.turn == 1 - turn
    assert (got[:4] == 1).all() and (got[4:] == 0).all() and torch.equal(got_ids[:4], ids)


@pytest.mark.parametrize("known", [True, False], ids=["other rows", "boxes made anew"])
def test_rows_that_are_not_those_sent_ahead_or_whose_box_is_gone_are_sent(mailboxes, known):
    x, ids = torch.ones(4, 32), torch.arange(4)
    if known:
        mailboxes.all_gather([x, ids])
    turn = mailboxes.turn
    mailboxes.send_ahead(x)
    x = x + 2 if known else x.fill_(3)
    got, _ = mailboxes.all_gather([x, ids])
    assert mailboxes.turn == 1 - turn and (got[:4] == 3).all()
    mailboxes.reduce_scatter([got])
    assert mailboxes.turn == turn
