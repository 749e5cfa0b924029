"""Bytes that a rank sends in a collective: over NVLink within its node and over the network to other nodes."""

from collections.abc import Sequence
from typing import NamedTuple


class Sent(NamedTuple):
    """Bytes that a rank sends within its node (`wire`) and to other nodes (`network`)."""

    wire: float
    network: float


class Group(NamedTuple):
    """The size of a process group, and how many of its ranks are on one node (`near`)."""

    size: int = 1
    near: int = 1

    def ring(self, size: float) -> Sent:
        """Return what a rank sends in an all-gather or reduce-scatter of a full tensor of `size` bytes. NCCL uses
        as many rings as the group has ranks on a node, and each ring leaves the node at another rank.
        """
        total = size * (self.size - 1) / self.size
        far = total / self.near if self.size > self.near else 0.0
        return Sent(total - far, far)

    def pairs(self, size: float) -> Sent:
        """Return what a rank sends in an all-to-all of `size` bytes, an equal part for each rank including itself."""
        each = size / self.size
        return Sent(each * (self.near - 1), each * (self.size - self.near))


def group_of(ranks: Sequence[int], per_node: int) -> Group:
    """Return the group of these ranks as seen by the first one. Nodes have `per_node` consecutive ranks."""
    return Group(len(ranks), sum(rank // per_node == ranks[0] // per_node for rank in ranks))
