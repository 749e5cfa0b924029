"""What a rank sends in an exchange, and how much of it leaves the node: NVLink inside, the network between nodes."""

from collections.abc import Sequence
from typing import NamedTuple


class Sent(NamedTuple):
    """Bytes that a rank sends to others of its node, and to other nodes."""

    wire: float
    network: float


class Group(NamedTuple):
    """Ranks that exchange something, and how many of them are on one node."""

    size: int = 1
    near: int = 1

    def ring(self, size: float) -> Sent:
        """What a rank sends while a tensor of `size` bytes is gathered from all or reduced to all, each 1/`self.size`
        of it. NCCL does so in rings, as many as a node has members: each leaves the node at another one.
        """
        total = size * (self.size - 1) / self.size
        far = total / self.near if self.size > self.near else 0.0
        return Sent(total - far, far)

    def pairs(self, size: float) -> Sent:
        """The same where a rank has `size` bytes, equally many for each of all ranks, itself included."""
        each = size / self.size
        return Sent(each * (self.near - 1), each * (self.size - self.near))


def group_of(ranks: Sequence[int], per_node: int) -> Group:
    """The group of these ranks, seen from the first, where ranks fill nodes of so many GPUs one after the other."""
    return Group(len(ranks), sum(rank // per_node == ranks[0] // per_node for rank in ranks))
