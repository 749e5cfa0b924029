"""Even load without an auxiliary loss: after each step the routers' bias moves towards experts that got too little.

    bias_e += rate * sign(mean of c - c_e)      c: rows that each expert got in the step, summed over all ranks

DeepSeek-V3's way (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664), for its routers and others with an
`e_score_correction_bias`, which takes part in the choice of experts, not in their weights, and has no gradient.
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
    """A callback for `Trainer`. `load` knows which tokens are padding (the trainer's own `trainer.load`).

    rate: by how much a bias moves per step; scores are between 0 and 1. DeepSeek-V3 was trained with 0.001. Raises
    ValueError if no router of the model has such a bias.
    """

    def __init__(self, model: nn.Module, load: RouterLoad, rate: float):
        self.rate = rate
        self.routers = {name: r for name, r in routers(model) if isinstance(getattr(r, BIAS, None), torch.Tensor)}
        if not self.routers:
            raise ValueError(
                f"No router of {type(model).__name__} has an {BIAS} to move. Balance its experts by the auxiliary loss "
                f"instead (router_aux_loss_coef)."
            )
        self.counts = {name: torch.zeros_like(getattr(r, BIAS), dtype=torch.long) for name, r in self.routers.items()}
        load.count_into(self.counts, self.routers)

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer, on every rank; nothing here waits for the device. What did not run stays as it is."""
        counts_LE = torch.stack([*self.counts.values()])
        if dist.is_initialized():
            dist.all_reduce(counts_LE)
        moves_LE = self.rate * (counts_LE.float().mean(1, keepdim=True) - counts_LE).sign()
        for router, move_E in zip(self.routers.values(), moves_LE, strict=True):
            bias: Any = getattr(router, BIAS)
            bias += move_E.to(bias)
        for counts_E in self.counts.values():
            counts_E.zero_()
