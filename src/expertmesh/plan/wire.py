"""Exchanges for planned steps. They send nothing, allocate what the real exchanges allocate (moe/gather.py,
moe/all_to_all.py), and record what those would send. All ranks of the group get an equal share of the rows.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch

from expertmesh.kernels.grouping import combine
from expertmesh.moe.exchange import Exchange, Maybe
from expertmesh.moe.experts import Dispatch
from expertmesh.moe.gather import Gather, Mailboxes
from expertmesh.plan.links import Group
from expertmesh.plan.trace import StepRecorder


class PlannedDispatch(Dispatch):
    """`Dispatch` of a layer of which this rank holds 1/num_ranks of the experts, without process groups."""

    timeout: Any

    def __init__(self, experts: Any, ranks: Group, watch: StepRecorder, near: bool, tp_mesh: Any = None) -> None:
        self.transport = PlannedGather if near else PlannedAllToAll
        self.experts, self.slices, self.tp_mesh = experts, tp_mesh is not None, tp_mesh
        self.group, self.rank, self.ranks = None, 0, ranks
        self.num_ranks, self.num_local_experts = ranks.size, experts.num_experts
        self.timeout, self.watch = nullcontext(), watch


class _Link(Mailboxes):
    """Mailboxes without buffers, as the real ones are not in PyTorch's memory."""

    def __init__(self, size: int, watch: StepRecorder) -> None:
        self.size, self.watch = size, watch

    def _record(self, parts: list[torch.Tensor], pieces: int) -> None:
        """Record that this rank sends 1/`pieces` of each part to each other rank."""
        size = sum(part.nbytes for part in parts) // pieces
        self.watch.add("wire", 0.0, size * (self.size - 1))

    def all_gather(self, parts: list[torch.Tensor], sent: Any = None, copy: bool = True) -> list[torch.Tensor]:
        self._record(parts, 1)
        room = [(self.size * len(part), *part.shape[1:]) for part in parts]
        if copy:
            return [part.new_empty(shape) for part, shape in zip(parts, room, strict=True)]
        # the results are views of the mailbox: an expanded row has the shape without the memory
        return [part.new_empty(1, *part.shape[1:]).expand(shape) for part, shape in zip(parts, room, strict=True)]

    def reduce_scatter(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        self._record(parts, self.size)
        return [part.new_empty(len(part) // self.size, *part.shape[1:]) for part in parts]

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        rows = len(position_MK) // self.size
        self.watch.add("wire", 0.0, rows * y_SH.shape[1] * y_SH.itemsize * (self.size - 1))
        return y_SH.new_empty(rows, y_SH.shape[1])


class PlannedGather(Gather):
    """`Gather` with the same number of tokens on all ranks."""

    def __init__(self, layer: PlannedDispatch, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.timeout, self.sharing_ranks = layer, layer.timeout, layer.num_ranks
        self._link, self._num_tokens, self._rows = _Link(layer.num_ranks, layer.watch), len(x_TH), len(x_TH)
        layer.watch.share = 1 / layer.num_ranks


class PlannedAllToAll(Exchange):
    """`AllToAll` with random routing: a rank receives as many rows as it sends."""

    def __init__(self, layer: PlannedDispatch, x_TH: torch.Tensor, ahead: bool = False) -> None:
        self.layer, self.timeout = layer, layer.timeout

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> tuple:
        tokens, top_k, ranks = *ids_TK.shape, self.layer.num_ranks
        others = (ranks - 1) * self.layer.num_local_experts  # a rank gets no row if all K are among these
        missed = math.comb(others, top_k) / math.comb(ranks * self.layer.num_local_experts, top_k)
        rows = max(1, round(tokens * ranks * (1 - missed)))
        self.tokens, self.rows = tokens, rows
        self.num_local_rows = tokens * top_k
        self.layer.watch.share = 1.0
        self._sends(x_TH, 2 * top_k * 4)
        return x_TH.new_empty(rows, x_TH.shape[1]), ids_TK.new_empty(rows, top_k), weight_TK.new_empty(rows, top_k)

    def combine(self, y_SH: torch.Tensor, position_MK: torch.Tensor, weight_MK: Maybe, residual: Maybe) -> torch.Tensor:
        sums = combine(y_SH, position_MK, weight_MK)
        self._sends(sums)
        back, out = torch.empty_like(sums), sums.new_empty(self.tokens, sums.shape[1])
        del back
        return out if residual is None else residual + out.view(residual.shape)

    def combine_backward(self, dout_TH: torch.Tensor) -> torch.Tensor:
        self._sends(dout_TH)
        packed = dout_TH.new_empty(self.rows, dout_TH.shape[1])
        return torch.empty_like(packed)

    def dispatch_backward(self, dx_MH: Maybe, dweight_MK: Maybe) -> Any:
        def first(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.new_empty(self.tokens, part.shape[1])

        if dx_MH is not None:
            self._sends(dx_MH)
        return lambda: (first(dx_MH), first(dweight_MK))

    def _sends(self, rows: torch.Tensor, more: int = 0) -> None:
        size = self.rows * (rows.shape[1] * rows.itemsize + more)
        self.layer.watch.record_sent("", self.layer.ranks.pairs(size))
