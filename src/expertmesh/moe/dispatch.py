"""Expert parallelism: a layer's experts spread over the ranks of a mesh, reached through one of `TRANSPORTS`.

`Dispatch` is the forward of such experts. It stands where Transformers puts an `EPImplementation`, and `lean_layout`
(parallel/layout.py) then makes it the module's own forward, which takes a residual and an exchange, too.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.distributed.parallel_utils import _use_local_dtensor_params

from expertmesh.kernels.grouping import or_none
from expertmesh.moe.all_to_all import AllToAll
from expertmesh.moe.experts import NAME, Exchange, Outputs, activation_of, compute
from expertmesh.moe.gather import Gather
from expertmesh.waiting import waiting

# how tokens reach experts on other ranks, by the names that `DistributedSetup.dispatch` knows
TRANSPORTS: dict[str, type[Exchange]] = {"all_to_all": AllToAll, "gather": Gather}


class Dispatch(EPImplementation):
    """The experts of one layer, spread over the ranks of `ep_mesh`; each call makes an exchange by `transport`.

    group, rank, num_ranks: the ranks, and this one among them; it holds `num_local_experts`, those of rank 0 are the
    first. waits: within it the exchanges are made. slices: the ranks of a tensor-parallel group hold the same tokens,
    each sends a slice, and the results are gathered back over `tp_mesh`. All state lives in the call.
    """

    num_local_experts: Any

    def __init__(self, transport: type[Exchange], experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.transport, self.experts, self.slices = transport, experts, tp_mesh.size() > 1
        self.group, self.rank, self.num_ranks = ep_mesh.get_group(), ep_mesh.get_local_rank(), ep_mesh.size()
        self.waits = waiting("some experts", self.group)  # the layout sets its place, their name
        experts.dispatch = self

    @torch.compiler.disable
    def __call__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: torch.Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        """Output [T, H] for hidden_states [T, H], global expert ids [T, K] and routing weights [T, K]; T may be 0.

        residual: [..., H] in the hidden states' dtype, added to the result, which then has its shape. exchange: one of
        these tokens that began before the router had chosen, unless this `slices`.
        """
        experts, x_TH, ids_TK, weight_TK = self.experts, hidden_states, top_k_index, top_k_weights
        if self.slices:
            x_TH, ids_TK, weight_TK = (_my_rows(x, self.tp_mesh) for x in (x_TH, ids_TK, weight_TK))
        inside = None if self.slices else residual
        exchange = exchange or self.transport(self, x_TH)
        ours = experts.config._experts_implementation == NAME and x_TH.dtype == experts.down_proj.dtype
        act = activation_of(experts) if ours else None
        with self.waits:
            if act is not None:
                out = compute(experts, act, x_TH, ids_TK, weight_TK, inside, exchange)
            else:  # another backend, which finds this rank's part of the weights in the place of the whole
                x_MH, weight_MK, ids_MK = _Dispatch.apply(x_TH, weight_TK, ids_TK, exchange)
                with _use_local_dtensor_params(experts):
                    y_MH = self.experts_forward(x_MH, or_none(ids_MK, self.num_local_experts), weight_MK)
                out = _Combine.apply(y_MH.to(x_TH.dtype), inside, exchange)
        if not self.slices:
            return out
        out = _all_rows(out, self.tp_mesh, hidden_states.shape)
        return out if residual is None else residual + out.view(residual.shape)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH, weight_TK, ids_TK, exchange: Exchange):
        ctx.exchange = exchange
        x_MH, ids_MK, weight_MK = exchange.dispatch(x_TH, ids_TK, weight_TK)
        ctx.mark_non_differentiable(ids_MK)
        return x_MH, weight_MK, ids_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH, dweight_MK, _):
        need_x, need_weight, *_ = ctx.needs_input_grad
        with ctx.exchange.waits:
            wait = ctx.exchange.dispatch_backward(dx_MH if need_x else None, dweight_MK if need_weight else None)
            return *wait(), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MH, residual, exchange: Exchange):
        ctx.exchange = exchange
        return exchange.combine(Outputs(y_MH), residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        with ctx.exchange.waits:
            dy_MH = ctx.exchange.combine_backward(dout.flatten(0, -2)) if ctx.needs_input_grad[0] else None
        return dy_MH, dout if ctx.needs_input_grad[1] else None, None


def _my_rows(x: torch.Tensor, tp_mesh: Any) -> torch.Tensor:
    """This rank's slice of tokens that the whole group holds; backward gathers the slices' gradients."""
    x = x.to_local() if isinstance(x, DTensor) else x
    whole = DTensor.from_local(x, tp_mesh, [Replicate()], run_check=False)
    return whole.redistribute(tp_mesh, [Shard(0)]).to_local()


def _all_rows(x: torch.Tensor, tp_mesh: Any, shape: torch.Size) -> torch.Tensor:
    """The slices of all ranks of the group, in order; uneven and empty ones too."""
    x = x.contiguous()
    return DTensor.from_local(x, tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)).full_tensor()


for _transport in TRANSPORTS.values():
    EPImplementationInterface.register(_transport.ep_implementation, partial(Dispatch, _transport))
