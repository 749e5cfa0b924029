"""Tokens to those GPUs of a node that need them, and sums back: gather.py for more than a few ranks.

    store rows into the mailboxes of the ranks that need them → this rank's experts → store partial sums back → sum

The mailboxes are links.py's, with a place for every token of every rank, so nothing is counted, nothing can overflow,
and the host never waits. But a token's row is stored only where some of its experts are, once for each such rank; ids
and weights go to all, and tell each rank which rows will come. Rows that did not come are zeros to the experts. Back
come partial sums from the same ranks only; their owner knows which and adds them up in the order of the ranks, in
float32.

Rows travel by stores of a kernel, not by copy engines, which know no masks. Where GPUs do not map each other's memory
there are no mailboxes: all_to_all.py does it then, which sends the same rows.

Registered in Transformers as the `ep_implementation` "expertmesh-push".
"""

from functools import cache

import torch
import torch.distributed as dist
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh import backends
from expertmesh.dispatch.all_to_all import AllToAll
from expertmesh.dispatch.gather import Gather
from expertmesh.dispatch.links import Mailboxes
from expertmesh.kernels.combine import combine
from expertmesh.kernels.copy_rows import copy_rows

NAME = "expertmesh-push"


class Push(Gather):
    """The experts of one layer, spread over the ranks of `ep_mesh`; slices of a tensor-parallel group as there."""

    def send_ahead(self, x_TH: torch.Tensor) -> None:
        """Nothing: who needs a row is known only when the router has chosen."""

    def _run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        boxes = self._link()
        if not isinstance(boxes, Mailboxes):
            _tell_of_all_to_all(self.ep_mesh.get_group())
            residual, out_TH = self._residual, AllToAll._run(self, x_TH, ids_TK, weight_TK)
            return out_TH if residual is None else residual + out_TH
        return self._through(Pushed(boxes, self.num_local_experts), x_TH, ids_TK, weight_TK)


@cache
def _tell_of_all_to_all(group: dist.ProcessGroup) -> None:
    backends.logger().info(
        f"expertmesh: dispatch='push' between {group.size()} ranks needs memory open to all of them; "
        "instead it sends as 'all_to_all' does"
    )


class Pushed:
    """A `Link` for one forward of one layer, and its backward: rows go only to the ranks that need them.

    needed_RT: which of this rank's tokens rank r needs. mine_RT: which of rank r's tokens this rank needs.
    """

    def __init__(self, boxes: Mailboxes, experts_per_rank: int) -> None:
        self.boxes, self.experts_per_rank = boxes, experts_per_rank
        self.needed_RT = self.mine_RT = torch.empty(0)

    def all_gather(self, parts: list[torch.Tensor], lasting: bool = True) -> list[torch.Tensor]:
        """The first part's rows where they are needed, zeros elsewhere; all of the others. They always last.

        The second part of the first exchange must be the tokens' global expert ids [n, K]: they say who needs what.
        """
        boxes, (rows, *rest) = self.boxes, parts
        if rest:
            self.needed_RT = self._holders(rest[0], range(boxes.size))
        box, (place, *places) = boxes.begin(parts, 1)
        for receiver in (*boxes.others, boxes.rank):
            for to_all, part in zip(places, rest, strict=True):
                to_all[receiver].copy_(part)
            copy_rows(rows, self.needed_RT[receiver], place[receiver])
        box.barrier()
        whole = [to_all[-1].flatten(0, 1).clone() for to_all in places]
        if rest:
            mine_1M = self._holders(whole[0], range(boxes.rank, boxes.rank + 1))
            self.mine_RT = mine_1M.view(boxes.size, -1)
        return [combine(place[-1].flatten(0, 1), _positions(self.mine_RT.view(1, -1))), *whole]

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """For each part [R·n, …] this rank's n rows of it, summed over the ranks that needed them."""
        boxes = self.boxes
        box, places = boxes.begin(parts, boxes.size)
        for place, part in zip(places, parts, strict=True):
            chunks = part.chunk(boxes.size)
            for receiver in (*boxes.others, boxes.rank):
                copy_rows(chunks[receiver], self.mine_RT[receiver], place[receiver])
        box.barrier()
        position_TR = _positions(self.needed_RT)
        return [combine(place[-1].flatten(0, 1), position_TR) for place in places]

    def _holders(self, ids_TK: torch.Tensor, ranks: range) -> torch.Tensor:
        """[ranks, T], bool: who of them holds an expert of token t."""
        owner_TK = ids_TK // self.experts_per_rank
        rank_R = torch.arange(ranks.start, ranks.stop, device=ids_TK.device)
        return (owner_TK == rank_R[:, None, None]).any(-1)


def _positions(needed_RT: torch.Tensor) -> torch.Tensor:
    """position_TR for `combine`: token t's row of rank r in [R·T, …], or -1 where that rank did not need it, int32."""
    row_RT = torch.arange(needed_RT.numel(), dtype=torch.int32, device=needed_RT.device).view_as(needed_RT)
    return torch.where(needed_RT, row_RT, -1).t().contiguous()


EPImplementationInterface.register(NAME, Push)
