"""All tokens to all ranks, and sums of what their experts made of them back: for few ranks that lie near each other.

    all-gather tokens, ids and weights → this rank's experts → reduce-scatter of the partial sums

Tokens are on their way before the router has chosen, if the block around the experts calls `experts.send_ahead`. With 2
ranks this moves as many rows as sending each token once to every rank that needs it, with 4 hardly more; and nothing
about the routing has to be known on the host: shapes follow from how many tokens each rank has, which the hosts tell
each other once per forward, so the CPU never waits for a device. The experts skip pairs whose ids are not theirs. The
backward mirrors the forward: a reduce-scatter where that gathers, and the reverse. Rows travel by links.py.

Registered in Transformers as the `ep_implementation` "expertmesh-gather".
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh.moe.all_to_all import AllToAll
from expertmesh.moe.handoff import Handoff, offered
from expertmesh.moe.links import Collectives, Link, Mailboxes, link_of
from expertmesh.moe.replay import kept
from expertmesh.records import FORWARD
from expertmesh.waiting import hosts, waiting

NAME = "expertmesh-gather"


class Gather(AllToAll):
    """The experts of one layer, spread over the ranks of `ep_mesh`; slices of a tensor-parallel group as there."""

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._experts = experts
        self._residual: torch.Tensor | None = None  # of the call under way
        if tp_mesh.size() == 1:
            experts.send_ahead, experts.add_to = self.send_ahead, self.add_to

    def add_to(self, residual: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
        """residual [..., H] plus the output of the experts for these (hidden_states, top_k_index, top_k_weights)."""
        self._residual = residual.reshape(routed[0].shape)
        try:
            return self._experts(*routed).view(residual.shape)
        finally:
            self._residual = None

    def send_ahead(self, x_TH: torch.Tensor) -> None:
        """Let rows travel while the router chooses: `hidden_states` of the next call will be this x [T, H]."""
        link = self._link()
        if isinstance(link, Mailboxes):
            link.send_ahead(_padded(x_TH.detach(), self._rows(x_TH)))

    def _link(self) -> Link:
        group = self.ep_mesh.get_group()
        with waiting(self.layer, hosts(group), group):  # the first time, the ranks meet
            link = link_of(group)
        return Collectives(group, self.layer) if isinstance(link, Collectives) else link

    def _rows(self, x_TH: torch.Tensor) -> int:
        return kept(lambda: most_tokens(len(x_TH), self.ep_mesh.get_group(), self.layer))

    def _run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        experts_per_rank = self.num_local_experts
        num_experts = self.ep_mesh.size() * experts_per_rank
        residual, handoff = self._residual, Handoff(self._link(), self.ep_mesh.size(), self._residual)
        x_MH, ids_MK, weight_MK = _Gather.apply(x_TH, ids_TK, weight_TK, self._rows(x_TH), num_experts, handoff)
        # this rank's experts become 0, 1, …; all others', and the padding, something else
        ids_MK = ids_MK.sub_(self.ep_mesh.get_local_rank() * experts_per_rank)
        with offered(handoff):
            y_MH = self.experts_forward(x_MH, ids_MK, weight_MK)
        return _Scatter.apply(y_MH, residual, len(x_TH), handoff)


def most_tokens(num_tokens: int, group: dist.ProcessGroup, layer: str) -> int:
    """The largest number of tokens that any rank of the group has, at least 1; the hosts ask each other.

    In one forward the first layer asks: all get as many tokens.
    """
    agreed = FORWARD.get().num_tokens
    if agreed is not None and group in agreed:
        before, most = agreed[group]
        if before != num_tokens:
            raise RuntimeError(
                f"dispatch='gather' needs as many tokens in every layer of a forward, but here {before} became "
                f"{num_tokens}. Use dispatch='all_to_all' with this model."
            )
        return most
    answer = torch.tensor([max(num_tokens, 1)])
    with waiting(layer, hosts(group)):
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=hosts(group))
    most = int(answer)
    if agreed is not None:
        agreed[group] = num_tokens, most
    return most


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


class _Gather(torch.autograd.Function):
    """x [T, H], ids and weights [T, K] of each rank → those of all, padded to M = R · rows by ids `num_experts`."""

    @staticmethod
    def forward(ctx: Any, x_TH, ids_TK, weight_TK, rows: int, num_experts: int, handoff: Handoff):
        ctx.num_tokens, ctx.handoff = len(x_TH), handoff
        parts = _padded(x_TH, rows), _padded(ids_TK, rows, num_experts), _padded(weight_TK, rows)
        x_MH, ids_MK, weight_MK = handoff.link.all_gather(list(parts))
        handoff.remember(ctx, x_TH)
        ctx.mark_non_differentiable(ids_MK)
        return x_MH, ids_MK, weight_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH, _, dweight_MK):
        parts = [d for d, needed in ((dx_MH, ctx.needs_input_grad[0]), (dweight_MK, ctx.needs_input_grad[2])) if needed]
        sums = [_first(part, ctx.num_tokens) for part in ctx.handoff.finish(parts)] if parts else []
        dx_TH = sums.pop(0) if ctx.needs_input_grad[0] else None
        dweight_TK = sums.pop() if ctx.needs_input_grad[2] else None
        return dx_TH, None, dweight_TK, None, None, None


class _Scatter(torch.autograd.Function):
    """What the experts returned → this rank's sums over all ranks [T, H], plus a residual if there is one."""

    @staticmethod
    def forward(ctx: Any, y_MH: torch.Tensor, residual: torch.Tensor | None, num_tokens: int, handoff: Handoff):
        out = handoff.summed(y_MH)
        ctx.rows, ctx.handoff = len(out), handoff
        return _first(out, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor):
        # experts that send dx themselves have read this by then, and the next exchange may overwrite it
        ctx.handoff.recompute()
        (dy_MH,) = ctx.handoff.link.all_gather([_padded(dout, ctx.rows)], lasting=not ctx.handoff.adopted)
        return dy_MH, dout if ctx.needs_input_grad[1] else None, None, None


EPImplementationInterface.register(NAME, Gather)
