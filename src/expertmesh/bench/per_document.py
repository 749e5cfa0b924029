"""Reference results for packed and padded rows, from calling stock Transformers on each document separately.

In stock Transformers, Mamba2 layers carry their state from padding into the tokens after it, and from one packed
document into the next if only position_ids mark them; GPT-OSS's attention crosses documents unless it is
FlashAttention. Our layers do neither, so the reference for such rows comes from separate calls.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from expertmesh.families.table import RULES
from expertmesh.layers.base_model import keeps_state
from expertmesh.twins import Fast


def needs_per_document(model: Any, batch: str) -> bool:
    """Return whether our model handles this batch correctly and stock does not.

    For "packed", documents see each other in stock. For "left" (left-padded), stock counts positions from the first
    padding token, and its Mamba2 states start there.
    """
    on = {row.name for row in getattr(model, "fusion_report", list)() if row.on}
    return bool(on) if batch == "left" else batch == "packed" and bool(on & {"mamba2", "sink_attention"})


def supports_packing(module: nn.Module) -> bool:
    """Return whether a module can keep packed documents separate. A mixer with a state needs a twin for that."""
    known = isinstance(module, Fast) or any(rule.matches(type(module)) for rule in RULES if rule.fusion == "mamba2")
    return known or not keeps_state(module)


def run_per_document(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    use_cache: bool = False,
) -> Any:
    """Return `loss`, the mean over all labeled tokens of rows [B, S], and `logits` [B, S, V], zero at padding."""
    num_items = (labels[:, 1:] != -100).sum()
    begins = torch.zeros_like(input_ids, dtype=torch.bool) if position_ids is None else position_ids == 0
    keep = torch.ones_like(begins) if attention_mask is None else attention_mask != 0
    loss, rows = torch.zeros((), device=input_ids.device), []
    for ids, wanted, begin, kept in zip(input_ids, labels, begins, keep, strict=True):
        token = kept.nonzero().flatten()
        starts = begin[token].nonzero().flatten().tolist()
        logits = []
        for part in token.tensor_split([start for start in starts if start]):
            out = model(ids[part][None], labels=wanted[part][None], num_items_in_batch=num_items, use_cache=use_cache)
            loss = loss + out.loss
            logits.append(out.logits[0])
        row = torch.cat(logits)
        rows.append(row.new_zeros(len(ids), row.shape[1]).index_copy(0, token, row))
    return SimpleNamespace(loss=loss, logits=torch.stack(rows))
