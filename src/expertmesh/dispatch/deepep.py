"""Tokens to experts and back by DeepEP, where its package deep_ep is installed and `dispatch="deepep"` asks for it.

    layout → dispatch → this rank's experts → combine

The same rows travel as in all_to_all.py, once to each rank and one partial sum back, but by deep_ep's high-throughput
kernels, in bfloat16 only: over NVLink within a node, RDMA between nodes. The backward of its dispatch is its combine,
and the reverse; both go by the handle of the forward, so the host waits once per layer, for the number of rows, and not
in backward or in a recompute. Rows pass through its buffer in pieces: however many they are, no token is dropped.

Tested with a stand-in for deep_ep that exchanges over gloo. It has not run on GPUs with the real package yet.

Written for `deep_ep.Buffer` of https://github.com/deepseek-ai/DeepEP, versions 1, and 2, which keep it as legacy.
Registered in Transformers as the `ep_implementation` "expertmesh-deepep".
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers.distributed.expert_parallel import EPImplementationInterface

from expertmesh import backends
from expertmesh.dispatch.all_to_all import AllToAll, waiting
from expertmesh.memory.recompute import kept

NAME = "expertmesh-deepep"
NODE = 8  # GPUs of a node to deep_ep: larger groups take RDMA

_buffers: dict[dist.ProcessGroup, tuple[int, Any]] = {}  # with the bytes of the widest row that fits


def refuse_unfit(ep_size: int) -> None:
    """Raise ValueError if deep_ep cannot be imported, or has no kernels for groups of `ep_size` ranks."""
    try:
        buffer = backends.deep_ep().Buffer
        if ep_size > 1:
            buffer.get_dispatch_config(ep_size)
    except (ImportError, AttributeError, AssertionError, OSError) as error:
        raise ValueError(
            f"dispatch='deepep' cannot be used with ep_size={ep_size}: {error}. Install deep_ep from "
            f"https://github.com/deepseek-ai/DeepEP and use an ep_size that it knows, or set dispatch to 'all_to_all'."
        ) from error


class DeepEP(AllToAll):
    """The experts of one layer, spread over the ranks of `ep_mesh`; slices of a tensor-parallel group as there.

    Raises ValueError for hidden states that are not bfloat16.
    """

    def _run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        if x_TH.dtype != torch.bfloat16:
            raise ValueError(
                f"dispatch='deepep' carries bfloat16, not {x_TH.dtype}: load the model with dtype='bfloat16', or set "
                f"dispatch to 'all_to_all'."
            )
        x_MH, ids_MK, weight_MK, handle = _Dispatch.apply(x_TH, weight_TK, ids_TK, self)
        num_rows = len(x_MH)
        if num_rows == 0:  # experts never run on nothing: on a row of zeros that has no expert here
            x_MH, weight_MK = pad(x_MH, (0, 0, 0, 1)), pad(weight_MK, (0, 0, 0, 1))
            ids_MK = pad(ids_MK, (0, 0, 0, 1), value=self.num_local_experts)
        y_MH = self.experts_forward(x_MH, ids_MK, weight_MK)
        return _Combine.apply(y_MH if num_rows else y_MH[:0], handle, self)

    def buffer(self, rows: torch.Tensor) -> Any:
        """The `Buffer` of all layers between these ranks; wider rows than any before get a new one, on all at once."""
        group, row_bytes, size = self.ep_mesh.get_group(), rows.shape[1] * rows.element_size(), self.ep_mesh.size()
        if group not in _buffers or _buffers[group][0] < row_bytes:
            _buffers.pop(group, None)  # its memory goes first
            make = backends.deep_ep().Buffer
            configs = make.get_dispatch_config(size), make.get_combine_config(size)
            nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs) if size > NODE else 0
            with waiting(self.layer, group):
                _buffers[group] = row_bytes, make(group, nvlink, rdma)
        return _buffers[group][1]

    def there(self, rows_TH: torch.Tensor, **layout: Any) -> Any:
        """deep_ep's dispatch of this rank's rows, by a layout or the handle of an earlier one."""
        buffer = self.buffer(rows_TH)
        with waiting(self.layer, self.ep_mesh.get_group()):
            return buffer.dispatch(rows_TH.contiguous(), **layout)

    def back(self, rows_MH: torch.Tensor, handle: Any, weight_MK: torch.Tensor | None = None) -> Any:
        """deep_ep's combine: for each of this rank's tokens the sum of its rows, and of its weights, if given."""
        return self.buffer(rows_MH).combine(rows_MH.contiguous(), handle, topk_weights=weight_MK)


class _Dispatch(torch.autograd.Function):
    """x [T, H], weights and ids [T, K] → what this rank's experts get: rows [M, H], local ids and weights [M, K]."""

    @staticmethod
    def forward(ctx: Any, x_TH, weight_TK, ids_TK, experts: DeepEP):
        came: list[torch.Tensor] = []

        def decide() -> tuple[Any, torch.Tensor, torch.Tensor]:
            ids = ids_TK.to(getattr(backends.deep_ep(), "topk_idx_t", torch.int64)).contiguous()
            num_experts = experts.num_local_experts * experts.ep_mesh.size()
            per_rank, per_node, per_expert, sent_TR, _ = experts.buffer(x_TH).get_dispatch_layout(ids, num_experts)
            x_MH, ids_MK, weight_MK, _, handle, _ = experts.there(
                x_TH,
                topk_idx=ids,
                topk_weights=weight_TK.float().contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                num_tokens_per_expert=per_expert,
                is_token_in_rank=sent_TR,
            )
            came.append(x_MH)
            return handle, torch.where(ids_MK < 0, experts.num_local_experts, ids_MK.long()), weight_MK

        ctx.handle, ids_MK, weight_MK = kept(decide)
        ctx.experts, ctx.weight_dtype = experts, weight_TK.dtype
        ctx.mark_non_differentiable(ids_MK)
        x_MH = came[0] if came else experts.there(x_TH, handle=ctx.handle)[0]
        return x_MH, ids_MK, weight_MK.clone(), ctx.handle  # what is kept must stay outside of any graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH, _, dweight_MK, __):
        need_weight = ctx.needs_input_grad[1]
        dx_TH, dweight_TK, _ = ctx.experts.back(dx_MH, ctx.handle, dweight_MK.contiguous() if need_weight else None)
        return dx_TH, dweight_TK.to(ctx.weight_dtype) if need_weight else None, None, None


class _Combine(torch.autograd.Function):
    """The experts' rows [M, H] → every token's sum over the ranks that it went to [T, H]."""

    @staticmethod
    def forward(ctx: Any, y_MH, handle: Any, experts: DeepEP):
        ctx.handle, ctx.experts = handle, experts
        return experts.back(y_MH, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH):
        return ctx.experts.there(dout_TH, handle=ctx.handle)[0], None, None


EPImplementationInterface.register(NAME, DeepEP)
