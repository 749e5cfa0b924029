"""How tokens choose experts in a benchmark; the same on every arm.

random-init  as the initialised router chooses; loads are far from even ("busiest" tells how far).
skewed       as trained routers choose: a few experts get many tokens. A share p_e of the tokens is to choose expert e:
             proportional to 1 / rank (Zipf), at most 0.4, with the sum K; ranks are drawn at random. To get this, the
             router's row of expert e keeps its direction and gets the length s_e = 1 / Q(1 - p_e), Q the normal
             quantile. Why: behind a norm the entries of an input are nearly independent and of size 1, so the logit is
             nearly normal with deviation s_e, and above 1 for a share p_e of the tokens. About K logits of a token are
             above 1, and the router takes those. Group-limited routers follow the law less closely. Each row of the
             result has the load that came out ("busiest": the largest expert's rows over the mean).
balanced     what published benchmarks often use: token t gets experts tK … tK+K-1 modulo E, each expert the same
             number of rows. A forward hook replaces the router's choice, on every arm alike; the weights are the
             softmax of the chosen experts' logits, so that the router is still trained, and still runs.
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
    """Make a freshly initialised model route as one of `ROUTINGS` says, in place. Each router holds `weight` [E, H] and
    returns (logits [T, E], weights, ids [T, K])."""
    for number, (_, router) in enumerate(routers(model)):
        if routing == "skewed":
            weight: Any = router.weight
            weight.data.copy_(skewed(weight.data, top_k, seed=number))
        elif routing == "balanced":
            router.register_forward_hook(_deal)


def zipf_shares(experts: int, top_k: int) -> list[float]:
    """The share of tokens that choose the expert of each rank: c / rank, at most 0.4, with the sum `top_k`."""
    low, high = 0.0, float(top_k * experts)
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(min(LARGEST_SHARE, middle / rank) for rank in range(1, experts + 1))
        low, high = (middle, high) if total < top_k else (low, middle)
    return [min(LARGEST_SHARE, high / rank) for rank in range(1, experts + 1)]


@torch.no_grad()
def busiest(model: PreTrainedModel, inputs: dict[str, Any]) -> float:
    """Rows of a layer's largest expert over the mean of its experts, on these inputs; the mean over layers."""
    loads = []

    def look(router: nn.Module, args: Any, output: tuple) -> None:
        logits_TE, _, ids_TK = output
        counts = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[-1]).float()
        loads.append(counts.max() / counts.mean())

    hooks = [router.register_forward_hook(look) for _, router in routers(model)]
    model.base_model(**inputs)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(loads).mean())


def skewed(weight_EH: torch.Tensor, top_k: int, seed: int) -> torch.Tensor:
    """A router's weights [E, H] with rows of the lengths that `skewed` routing needs, in float32."""
    experts = len(weight_EH)
    deviations = torch.tensor([1 / NormalDist().inv_cdf(1 - share) for share in zipf_shares(experts, top_k)])
    dealt = deviations[torch.randperm(experts, generator=torch.Generator().manual_seed(seed))]
    rows = weight_EH.float()
    return rows * (dealt.to(rows.device) / rows.norm(dim=1))[:, None]


def _deal(router: nn.Module, args: Any, output: tuple) -> tuple:
    """Forward hook: deals the experts out in order, whatever the router chose; ids and weights keep their dtypes."""
    logits_TE, weights_TK, ids_TK = output
    tokens, top_k = ids_TK.shape
    rows = torch.arange(tokens * top_k, device=ids_TK.device, dtype=ids_TK.dtype)
    dealt_TK = (rows % logits_TE.shape[-1]).view(tokens, top_k)
    chosen_TK = logits_TE.reshape(tokens, -1).gather(1, dealt_TK.long())
    return logits_TE, chosen_TK.float().softmax(-1).to(weights_TK.dtype), dealt_TK
