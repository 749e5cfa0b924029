"""Where the tokens go: how many rows each expert of each layer received, counted on the device while training.

A forward hook on every router adds its choices to one vector per layer. Nothing waits for the device until `window()`
is read, at a logging step, by all ranks together: the counts are summed over them. Counted are the tokens that are not
padding, in training mode only. Recomputed layers (activation checkpointing) may be counted twice, all of them alike;
the metrics are ratios and do not change.

Metrics of one layer, from its counts c_E:
    load_cv     standard deviation of c over its mean; 0 is perfect balance
    max_vio     the largest c over the mean, minus 1 (MaxVio of "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664)
    dead_frac   share of experts that received nothing
    entropy     entropy of c / sum(c), over log E: 1 is perfect balance, 0 one expert for all
    rank_vio    with expert parallelism: the largest sum of c over one rank's experts, over their mean, minus 1; in
                steps and layers above 0.25 that rank computes rows again in the backward ("gather")
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from expertmesh.moe.block import routers


class RouterLoad:
    """Counts of a model's routers. `layers` are their names, and every array here is [layers, experts].

    `first` and `last` are the counts of the first and the latest logging window, `total` of all of them; None before.
    `ranks`: how many share out the experts. `counts`: of each router that has run, how many rows this rank's tokens
    gave each expert, int64 [E]; they only grow.
    """

    first: np.ndarray | None = None
    last: np.ndarray | None = None
    total: np.ndarray | None = None
    # of the microbatch in work, nonzero where a token is no padding; with another number of tokens it says nothing
    mask: torch.Tensor | None = None

    def __init__(self, model: nn.Module):
        layout = getattr(getattr(model, "config", None), "distributed_config", None)
        self.ranks: int = getattr(layout, "ep_size", None) or 1
        self.counts: dict[nn.Module, torch.Tensor] = {}
        self._routers = dict(routers(model))
        self.layers = list(self._routers)
        for router in self._routers.values():
            router.register_forward_hook(self._count)

    def _count(self, router: nn.Module, _: Any, output: Any) -> None:
        """Sums are kept in place, so that a recorded step (graphed.py) goes on with them."""
        if not router.training or not isinstance(output, tuple):
            return
        ids = next((x for x in reversed(output) if not x.is_floating_point()), None)
        if ids is None:  # a router that does not return its choices (llama4) is left out
            return
        ids_TK = ids.detach().reshape(-1, ids.shape[-1]).long()
        one_TK = torch.ones_like(ids_TK)
        if self.mask is not None and self.mask.numel() == len(ids_TK):
            one_TK *= (self.mask.reshape(-1, 1) != 0).to(ids_TK.device)
        found_E = torch.zeros(output[0].shape[-1], dtype=torch.long, device=ids_TK.device)
        found_E.scatter_add_(0, ids_TK.flatten(), one_TK.flatten())
        known = self.counts.get(router)
        self.counts[router] = found_E if known is None else known.to(found_E.device).add_(found_E)

    def window(self) -> dict[str, float]:
        """Metrics of what was counted since the last call, means over the layers; {} if nothing was.

        Waits for the device, and starts a new window. All ranks must call it.
        """
        if not (names := [name for name in self.layers if self._routers[name] in self.counts]):
            return {}
        counts = [self.counts[self._routers[name]] for name in names]
        summed = torch.stack([each.to(counts[0].device) for each in counts])
        if dist.is_initialized():
            dist.all_reduce(summed)
        total_LE = summed.cpu().numpy()
        new_LE = total_LE if self.total is None else total_LE - self.total
        self.layers = names
        if not new_LE.any():
            return {}
        self.first = new_LE if self.first is None else self.first
        self.last, self.total = new_LE, total_LE
        return {f"moe/{name}": float(values.mean()) for name, values in layer_metrics(new_LE, self.ranks).items()}


def layer_metrics(counts_LE: np.ndarray, ranks: int = 1) -> dict[str, np.ndarray]:
    """The metrics, each [layers], from counts [layers, experts]. A layer without rows counts as balanced."""
    counts_LE = np.where(counts_LE.sum(1, keepdims=True) > 0, counts_LE, 1).astype(np.float64)
    mean_L1 = counts_LE.mean(1, keepdims=True)
    share_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    surprise_LE = -np.log(np.where(share_LE > 0, share_LE, 1.0))
    load_LR = counts_LE.reshape(len(counts_LE), ranks, -1).mean(2)  # ranks hold experts in their order
    return {
        "load_cv": (counts_LE / mean_L1).std(1),
        "max_vio": (counts_LE / mean_L1).max(1) - 1,
        "dead_frac": (counts_LE == 0).mean(1),
        "entropy": (share_LE * surprise_LE).sum(1) / np.log(max(counts_LE.shape[1], 2)),
    } | ({"rank_vio": (load_LR / mean_L1).max(1) - 1} if ranks > 1 else {})
