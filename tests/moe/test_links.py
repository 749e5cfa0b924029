"""Which link is chosen; and what is sent ahead is the first part of the next exchange, and is sent once."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from expertmesh.moe import gather as links
from expertmesh.moe.gather import Collectives, Mailboxes


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
    sent = mailboxes.send_ahead(x)
    x.fill_(2)
    got, got_ids = mailboxes.all_gather([x, ids], sent)
    assert mailboxes.turn == 1 - turn
    assert (got[:4] == 1).all() and (got[4:] == 0).all() and torch.equal(got_ids[:4], ids)


@pytest.mark.parametrize("known", [True, False], ids=["other rows", "boxes made anew"])
def test_rows_that_are_not_those_sent_ahead_or_whose_box_is_gone_are_sent(mailboxes, known, monkeypatch):
    x, ids = torch.ones(4, 32), torch.arange(4)
    if known:
        mailboxes.all_gather([x, ids])
    turn = mailboxes.turn
    sent = mailboxes.send_ahead(x)
    x = x + 2 if known else x.fill_(3)
    order, send = [], mailboxes._send
    monkeypatch.setattr(links, "join_side_stream", lambda device: order.append("join"))
    monkeypatch.setattr(mailboxes, "_send", lambda *to: order.append("send") or send(*to))
    got, _ = mailboxes.all_gather([x, ids], sent)
    assert mailboxes.turn == 1 - turn and (got[:4] == 3).all()
    assert order == ["join", "send", "send", "join"]  # on a GPU what was sent ahead must not arrive later
    mailboxes.reduce_scatter([got])
    assert mailboxes.turn == turn


def test_places_of_sizes_that_never_come_again_do_not_pile_up(mailboxes, monkeypatch):
    monkeypatch.setattr(links, "MAX_CACHED_SLOTS", 4)
    for rows in range(20, 1, -1):
        got, *_ = mailboxes.all_gather([torch.full((rows, 8), float(rows))])
        assert (got[:rows] == rows).all() and len(mailboxes._slots) <= 4


def test_boxes_stay_as_long_as_they_are_large_enough_and_their_places_go_with_them(mailboxes):
    rows = torch.ones(8, 32)
    mailboxes.all_gather([rows])
    boxes = mailboxes.boxes
    mailboxes.all_gather([rows.view(4, 64)])
    assert mailboxes.boxes is boxes
    mailboxes.all_gather([rows.repeat(2, 1)])
    mailboxes.all_gather([rows])
    memory = {box.of(0).data_ptr() for box in mailboxes.boxes}
    assert {slot.recv.data_ptr() for slots in mailboxes._slots.values() for slot in slots} <= memory


def test_ranks_settle_at_their_first_box(mailboxes, monkeypatch):
    met = []
    monkeypatch.setattr(links, "_open_mailboxes", lambda: [mailboxes])
    monkeypatch.setattr(Memory, "barrier", lambda box: met.append(box))
    links.mailbox_barrier()
    assert not met, "they have none yet"
    mailboxes.boxes = [Memory(1), Memory(1)]
    links.mailbox_barrier()
    assert met == mailboxes.boxes[:1]


NEIGHBOURS = [("here", 0), ("here", 1)]


@pytest.mark.parametrize(
    ("ranks", "errors", "why"),
    [
        (NEIGHBOURS, [None, None], None),
        ([("here", 0), None], [], "not on NVIDIA GPUs"),
        ([("here", 0), ("there", 1)], [], "more than one node"),
        ([("here", 0), ("here", 0)], [], "the ranks do not see each other's GPUs"),
        ([("here", 0), ("here", 2)], [], "GPUs that cannot access each other's memory"),
        (NEIGHBOURS, [None, "no"], "memory cannot be opened to other processes: no"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mailboxes_are_for_gpus_of_one_node_that_map_each_other_and_all_ranks_say_the_same(
    ranks, errors, why, monkeypatch
):
    answers = iter([ranks, errors])
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(
        dist, "all_gather_object", lambda found, mine, group: found.__setitem__(slice(None), next(answers))
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: abs(a - b) == 1)
    monkeypatch.setattr(links, "cpu_group", lambda group: group)
    monkeypatch.setattr(links, "DeviceMemory", lambda group, num_bytes: None)
    found = links._why_no_mailboxes(Group())
    assert found == why or found.startswith(why)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    links.cpu_group.cache_clear()
    yield dist.group.WORLD
    links.cpu_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("refuses", [True, False])
def test_where_memory_cannot_be_opened_to_others_rows_go_by_collectives_and_the_log_says_why(
    monkeypatch, group, refuses
):
    def open_memory(group, num_bytes):
        if refuses:
            raise RuntimeError("pidfd_getfd: Operation not permitted\nand where")

    monkeypatch.setattr(links, "DeviceMemory", open_memory)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    told = mock.Mock()
    monkeypatch.setattr(links.backends, "logger", lambda: told)
    link = links.link_of(group, "a test")
    assert isinstance(link, Collectives if refuses else Mailboxes)
    why = "collectives (memory cannot be opened to other processes: pidfd_getfd: Operation not permitted)"
    assert (why if refuses else "by mailboxes") in told.info.call_args.args[0]
    dist.destroy_process_group()
    assert not links.mailboxes() and group not in links._links  # freed with their group
