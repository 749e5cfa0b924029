"""A stand-in for the package deep_ep: what its `Buffer` documents, and asserts, done between CPUs over gloo.

`install()` puts it where `import deep_ep` finds it. Rows come ordered by the rank they come from, then by token; sums
are made in float32 in the order of ranks. `calls` counts what a test wants to know.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

calls: Counter[str] = Counter()
KNOWN = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
DEVICE_NODE = 8


@dataclass(frozen=True)
class Config:
    num_rows: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_rows * min(num_ranks, DEVICE_NODE) * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks > DEVICE_NODE, "a build without NVSHMEM asserts here"
        return self.num_rows * num_ranks * hidden_bytes


class EventOverlap:
    pass


class Buffer:
    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        calls["buffers"] += 1
        self.group, self.group_size = group, group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        everybody: list[Any] = [None] * self.group_size
        dist.all_gather_object(everybody, (num_nvl_bytes, num_rdma_bytes), group)
        assert len(set(everybody)) == 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in KNOWN, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in KNOWN, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(128)

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64
        assert num_experts % self.group_size == 0 and (topk_idx < num_experts).all()
        calls["layouts"] += 1
        chosen_TE = torch.zeros(len(topk_idx), num_experts, dtype=torch.bool)
        for k in range(topk_idx.shape[1]):
            real = (topk_idx[:, k] >= 0).nonzero()[:, 0]
            chosen_TE[real, topk_idx[real, k]] = True
        sent_TR = chosen_TE.view(len(topk_idx), self.group_size, num_experts // self.group_size).any(-1)
        return sent_TR.sum(0, dtype=torch.int32), None, chosen_TE.sum(0, dtype=torch.int32), sent_TR, EventOverlap()

    def dispatch(
        self,
        x: torch.Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple:
        self._check(x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            calls["dispatches by handle"] += 1
            assert len(x) == len(handle[0])
            return self._send(x, handle), None, None, None, None, EventOverlap()
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous() and topk_weights.shape == topk_idx.shape and len(x) == len(topk_idx)
        assert torch.equal(is_token_in_rank.sum(0, dtype=torch.int32), num_tokens_per_rank)
        calls["dispatches"] += 1
        counts = torch.stack([num_tokens_per_rank, torch.zeros_like(num_tokens_per_rank)])
        dist.all_to_all_single(counts[1], counts[0], group=self.group)
        handle = (is_token_in_rank, *counts.tolist())
        experts_per_rank = len(num_tokens_per_expert) // self.group_size
        local_MK = self._send(topk_idx, handle) - self.group.rank() * experts_per_rank
        mine_MK = (local_MK >= 0) & (local_MK < experts_per_rank)
        weight_MK = torch.where(mine_MK, self._send(topk_weights, handle), 0)
        here = [int((local_MK == expert).any(1).sum()) for expert in range(experts_per_rank)]
        return self._send(x, handle), torch.where(mine_MK, local_MK, -1), weight_MK, here, handle, EventOverlap()

    def combine(self, x: torch.Tensor, handle: tuple, topk_weights: torch.Tensor | None = None) -> tuple:
        self._check(x)
        assert x.dtype == torch.bfloat16
        assert len(x) == sum(handle[2])
        calls["combines"] += 1
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous() and len(topk_weights) == len(x)
            weights = self._sum(topk_weights, handle)
        return self._sum(x, handle), weights, EventOverlap()

    def _check(self, x: torch.Tensor) -> None:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] * 2 % 16 == 0
        for config in (self.get_dispatch_config(self.group_size), self.get_combine_config(self.group_size)):
            assert config.get_nvl_buffer_size_hint(x.shape[1] * 2, self.group_size) <= self.num_nvl_bytes

    def _send(self, x: torch.Tensor, handle: tuple) -> torch.Tensor:
        sent_TR, send, recv = handle
        rows = torch.cat([x[sent_TR[:, rank]] for rank in range(self.group_size)])
        came = rows.new_empty(sum(recv), x.shape[1])
        dist.all_to_all_single(came, rows, recv, send, self.group)
        return came

    def _sum(self, x: torch.Tensor, handle: tuple) -> torch.Tensor:
        sent_TR, send, recv = handle
        rows = x.new_empty(sum(send), x.shape[1])
        dist.all_to_all_single(rows, x, send, recv, self.group)
        total = torch.zeros(len(sent_TR), x.shape[1])
        for rank, part in enumerate(rows.split(send)):
            total[sent_TR[:, rank]] += part.float()
        return total.to(x.dtype)


def install() -> None:
    """Let this process find it as deep_ep."""
    module: Any = ModuleType("deep_ep")
    module.Buffer, module.Config, module.EventOverlap, module.topk_idx_t = Buffer, Config, EventOverlap, torch.int64
    sys.modules["deep_ep"] = module
