"""How tokens choose experts in a benchmark; the same in every arm.

random-init  The initialized router chooses. Loads are far from even; "busiest" in the result measures this.
skewed       Like trained routers, a few experts get many tokens. A share p_e of the tokens should choose expert e:
             proportional to 1 / rank (Zipf), at most 0.4, with the sum K; ranks are drawn at random. The router's row
             of expert e therefore keeps its direction and gets the length s_e = 1 / Q(1 - p_e), with Q the normal
             quantile. The router's input is normalized, so its entries are nearly independent and of size 1. The logit
             is then nearly normal with deviation s_e, and above 1 for a share p_e of the tokens. About K logits of a
             token are above 1, and the router chooses those. Group-limited routers follow this less closely. Each row
             of the result has the measured load ("busiest": the largest expert's rows over the mean).
balanced     Often used in published benchmarks: token t gets experts tK … tK+K-1 modulo E, so that all experts have the
             same number of rows. A forward hook replaces the router's choice in every arm. The weights are the
             softmax of the chosen experts' logits, so the router still runs and is trained.
"""

from statistics import NormalDist
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from expertmesh.train.routing import routers

ROUTINGS = ("random-init", "skewed", "balanced")
LARGEST_SHARE = 0.4


def set_routing(model: PreTrainedModel, routing: str, top_k: int) -> None:
    """Give a freshly initialized model one of `ROUTINGS`, in place. Each router must hold `weight` [E, H] and return
    (logits [T, E], weights, ids [T, K])."""
    for number, (_, router) in enumerate(routers(model)):
        if routing == "skewed":
            weight: Any = router.weight
            weight.data.copy_(skewed(weight.data, top_k, seed=number))
        elif routing == "balanced":
            router.register_forward_hook(_balance)


def zipf_shares(experts: int, top_k: int) -> list[float]:
    """Return the share of tokens that choose the expert of each rank: c / rank, at most 0.4, with the sum `top_k`."""
    low, high = 0.0, float(top_k * experts)
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(min(LARGEST_SHARE, middle / rank) for rank in range(1, experts + 1))
        low, high = (middle, high) if total < top_k else (low, middle)
    return [min(LARGEST_SHARE, high / rank) for rank in range(1, experts + 1)]


@torch.no_grad()
def busiest(model: PreTrainedModel, inputs: dict[str, Any]) -> float:
    """Return the rows of the largest expert over the mean of all experts of its layer, averaged over layers."""
    loads = []

    def record(router: nn.Module, args: Any, output: tuple) -> None:
        logits_TE, _, ids_TK = output
        counts = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[-1]).float()
        loads.append(counts.max() / counts.mean())

    hooks = [router.register_forward_hook(record) for _, router in routers(model)]
    model.base_model(**inputs)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(loads).mean())


def skewed(weight_EH: torch.Tensor, top_k: int, seed: int) -> torch.Tensor:
    """Return a router's weights [E, H] in float32, with the row lengths that `skewed` routing needs."""
    experts = len(weight_EH)
    deviations = torch.tensor([1 / NormalDist().inv_cdf(1 - share) for share in zipf_shares(experts, top_k)])
    shuffled = deviations[torch.randperm(experts, generator=torch.Generator().manual_seed(seed))]
    rows = weight_EH.float()
    return rows * (shuffled.to(rows.device) / rows.norm(dim=1))[:, None]


def _balance(router: nn.Module, args: Any, output: tuple) -> tuple:
    """Forward hook that assigns the experts to tokens in round-robin order. Ids and weights keep their dtypes."""
    logits_TE, weights_TK, ids_TK = output
    tokens, top_k = ids_TK.shape
    rows = torch.arange(tokens * top_k, device=ids_TK.device, dtype=ids_TK.dtype)
    balanced_TK = (rows % logits_TE.shape[-1]).view(tokens, top_k)
    chosen_TK = logits_TE.reshape(tokens, -1).gather(1, balanced_TK.long())
    return logits_TE, chosen_TK.float().softmax(-1).to(weights_TK.dtype), balanced_TK
