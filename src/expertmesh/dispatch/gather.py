"""All tokens to all ranks, and sums of what their experts made of them back: for few ranks that lie near each other.

    all-gather tokens, ids and weights → this rank's experts → reduce-scatter of the partial sums

With 2 ranks this moves as many rows as sending each token once to every rank that needs it, with 4 hardly more; and
nothing about the routing has to be known on the host: shapes follow from how many tokens each rank has, which the hosts
tell each other, so the CPU never waits for a device. Pairs of other ranks' experts carry the id "not mine", which the
experts skip. The backward mirrors the forward: a reduce-scatter where that gathers, and the reverse.

Registered in Transformers as the `ep_implementation` "expertmesh-gather".
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh.dispatch.all_to_all import AllToAll
from expertmesh.memory.recompute import kept

NAME = "expertmesh-gather"


class Gather(AllToAll):
    """The experts of one layer, spread over the ranks of `ep_mesh`; slices of a tensor-parallel group as there."""

    def _run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        group, experts_per_rank = self.ep_mesh.get_group(), self.num_local_experts
        rows = kept(lambda: most_tokens(len(x_TH), group))  # of any rank; the others are padded to it
        first = self.ep_mesh.get_local_rank() * experts_per_rank
        ids_MK = _gather(_padded(ids_TK, rows, self.ep_mesh.size() * experts_per_rank), group) - first
        ids_MK = torch.where((ids_MK >= 0) & (ids_MK < experts_per_rank), ids_MK, experts_per_rank)
        x_MH = _Gather.apply(x_TH, rows, group)
        weight_MK = _Gather.apply(weight_TK.float(), rows, group)
        y_MH = self.experts_forward(x_MH, ids_MK, weight_MK)
        return _Scatter.apply(y_MH, len(x_TH), group)


def most_tokens(num_tokens: int, group: dist.ProcessGroup) -> int:
    """The largest number of tokens that any rank of the group has, at least 1; the hosts ask each other."""
    most = torch.tensor([max(num_tokens, 1)])
    dist.all_reduce(most, dist.ReduceOp.MAX, group=_hosts(group))
    return int(most)


@cache
def _hosts(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks whose messages travel between their CPUs."""
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _padded(x: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    """x [T, …] with rows of `value` behind, up to `rows`."""
    if len(x) == rows:
        return x.contiguous()
    out = x.new_full((rows, *x.shape[1:]), value)
    out[: len(x)] = x
    return out


def _first(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows of x; no view, of which FSDP warns."""
    return x if len(x) == rows else x[:rows].clone()


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks of the group, in their order; x has as many on each."""
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x, group)
    return out


def _scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the rows of x, summed over the ranks of the group."""
    out = x.new_empty(len(x) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.num_tokens, ctx.group = len(x), group
        return _gather(_padded(x, rows), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _first(_scatter_sum(dx, ctx.group), ctx.num_tokens), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, num_tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.rows, ctx.group = len(y) // group.size(), group
        return _first(_scatter_sum(y, group), num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(_padded(dout, ctx.rows), ctx.group), None, None


EPImplementationInterface.register(NAME, Gather)
