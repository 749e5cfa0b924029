"""Stock Transformers on packed rows, one document after the other: what a model that mixes them up should compute.

Transformers' Mamba2 layers carry their state from one packed document into the next if only position_ids tell them
apart, and GPT-OSS's attention looks across, unless it is FlashAttention. Ours do not, so stock's numbers for such rows
are made from calls on the documents alone.
"""

from types import SimpleNamespace
from typing import Any

import torch


def keeps_apart(model: Any) -> bool:
    """Whether this model keeps packed documents apart where stock Transformers does not."""
    return any(row.name in ("mamba2", "sink_attention") and row.on for row in getattr(model, "fusion_report", list)())


def documents_apart(
    model: Any, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False
) -> Any:
    """(loss, logits) of packed rows [B, S]: `loss` the mean over all labelled tokens, `logits` [B, S, V]."""
    num_items = (labels[:, 1:] != -100).sum()
    loss, rows = torch.zeros((), device=input_ids.device), []
    for ids, wanted, positions in zip(input_ids, labels, position_ids, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()[1:]
        logits = []
        for part, its_labels in zip(ids.tensor_split(starts), wanted.tensor_split(starts), strict=True):
            out = model(part[None], labels=its_labels[None], num_items_in_batch=num_items, use_cache=use_cache)
            loss = loss + out.loss
            logits.append(out.logits)
        rows.append(torch.cat(logits, dim=1))
    return SimpleNamespace(loss=loss, logits=torch.cat(rows))
