"""Count how many tokens each expert of each layer receives in training, on the device, without a synchronization.

A forward hook on every router adds its choices to one vector per layer. At a logging step, all ranks call `window()`,
which waits for the device and sums the counts over the ranks. Padding is not counted, nor is evaluation. Layers that
are recomputed in the backward may be counted twice, which does not change the metrics, as they are ratios.

Metrics of one layer, from its counts c_E:
    load_cv     standard deviation of c over its mean; 0 is perfect balance
    max_vio     the largest c over the mean, minus 1 (MaxVio of "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664)
    dead_frac   share of experts that received nothing
    entropy     entropy of c / sum(c), over log E: 1 is perfect balance, 0 means one expert gets all tokens
    rank_vio    with expert parallelism: the largest number of tokens of a rank's experts over the mean, minus 1; in
                layers above 0.25 that rank recomputes rows in the backward (dispatch "gather")
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from expertmesh.moe.block import routers


class RouterLoad:
    """Token counts of a model's routers. `layers` are the routers' names; all arrays are [layers, experts].

    `first` and `last` are the counts of the first and the latest logging window, `total` is their sum over all windows;
    None before the first. `ranks` is the expert-parallel size. `counts` maps each router that has run to the number of
    this rank's tokens per expert, int64 [E]; the counts only grow.
    """

    first: np.ndarray | None = None
    last: np.ndarray | None = None
    total: np.ndarray | None = None
    # padding mask of the current micro-batch, nonzero for real tokens; ignored if its number of tokens differs
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
        """Add a router's choices to `counts`, in place, so that a replayed CUDA graph (graphed.py) updates them."""
        if not router.training or not isinstance(output, tuple):
            return
        ids = next((x for x in reversed(output) if not x.is_floating_point()), None)
        if ids is None:  # a router that does not return its choices (Llama 4)
            return
        ids_TK = ids.detach().reshape(-1, ids.shape[-1]).long()
        one_TK = torch.ones_like(ids_TK)
        if self.mask is not None and self.mask.numel() == len(ids_TK):
            one_TK *= (self.mask.reshape(-1, 1) != 0).to(ids_TK.device)
        new_E = torch.zeros(output[0].shape[-1], dtype=torch.long, device=ids_TK.device)
        new_E.scatter_add_(0, ids_TK.flatten(), one_TK.flatten())
        sum_E = self.counts.get(router)
        self.counts[router] = new_E if sum_E is None else sum_E.to(new_E.device).add_(new_E)

    def window(self) -> dict[str, float]:
        """Return the metrics since the last call, averaged over the layers ({} without tokens), and start a new window.

        Waits for the device. All ranks must call it.
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
    """Return the metrics, each [layers], from counts [layers, experts]. A layer without tokens counts as balanced."""
    counts_LE = np.where(counts_LE.sum(1, keepdims=True) > 0, counts_LE, 1).astype(np.float64)
    mean_L1 = counts_LE.mean(1, keepdims=True)
    share_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    surprise_LE = -np.log(np.where(share_LE > 0, share_LE, 1.0))
    load_LR = counts_LE.reshape(len(counts_LE), ranks, -1).mean(2)  # each rank has consecutive experts
    return {
        "load_cv": (counts_LE / mean_L1).std(1),
        "max_vio": (counts_LE / mean_L1).max(1) - 1,
        "dead_frac": (counts_LE == 0).mean(1),
        "entropy": (share_LE * surprise_LE).sum(1) / np.log(max(counts_LE.shape[1], 2)),
    } | ({"rank_vio": (load_LR / mean_L1).max(1) - 1} if ranks > 1 else {})
