"""Load balancing without an auxiliary loss: after each step, raise the router bias of experts with too few tokens.

    bias_e += rate * sign(mean of c - c_e)      c: tokens that each expert got in the step, summed over all ranks

This is the method of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664). It works for every router with an
`e_score_correction_bias`. That bias affects which experts are chosen, not their weights, and has no gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from expertmesh.moe.block import routers
from expertmesh.train.routing import RouterLoad

BIAS = "e_score_correction_bias"


class BalanceRouters(TrainerCallback):
    """Callback for `Trainer`. Pass `trainer.load`, which counts the tokens of each expert, as `load`.

    rate: the change of a bias per step; scores are between 0 and 1. DeepSeek-V3 was trained with 0.001. Raises
    ValueError if no router of the model has such a bias.
    """

    def __init__(self, model: nn.Module, load: RouterLoad, rate: float):
        self.rate, self.load = rate, load
        self.routers = [router for _, router in routers(model) if isinstance(getattr(router, BIAS, None), torch.Tensor)]
        if not self.routers:
            raise ValueError(
                f"No router of {type(model).__name__} has an {BIAS} to move. Balance its experts by the auxiliary loss "
                f"instead (router_aux_loss_coef)."
            )
        self.before_LE = self._counts()

    def _counts(self) -> torch.Tensor:
        zeros_E, counts = torch.zeros_like(getattr(self.routers[0], BIAS), dtype=torch.long), self.load.counts
        return torch.stack([counts.get(router, zeros_E) for router in self.routers])

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Update the biases, on every rank, without waiting for the device. Routers that did not run do not change."""
        all_LE = self._counts()
        counts_LE, self.before_LE = all_LE - self.before_LE.to(all_LE.device), all_LE
        if dist.is_initialized():
            dist.all_reduce(counts_LE)
        moves_LE = self.rate * (counts_LE.float().mean(1, keepdim=True) - counts_LE).sign()
        for router, move_E in zip(self.routers, moves_LE, strict=True):
            bias: Any = getattr(router, BIAS)
            bias += move_E.to(bias)
