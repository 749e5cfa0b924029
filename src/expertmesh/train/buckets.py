"""Pad batches of varying lengths to a few shapes (buckets), so that their steps can be recorded as CUDA graphs.

Packed documents and padded rows become one packed row with cu_seqlens (`cu_seq_lens_q`). Three sizes are rounded up:

    tokens       to a multiple of a quarter of the next lower power of two, by adding padding documents (label -100)
    documents    to a multiple of 32, by adding empty documents at the end
    longest      max_length_q, which the kernels get, to a power of two

`attention_mask` is 0 on the added tokens, for the router's auxiliary loss and for token counts. The collator packs
batches on the CPU (`one_row`). The padding is added on the device, without a synchronization, after all ranks have
exchanged their sizes (`bucket_for`, `pad_to_bucket`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from expertmesh.layers.base_model import FastBaseModel, is_of_rows
from expertmesh.layers.head import next_tokens
from expertmesh.layers.rows import Unpadded, inspect_rows

ROWS = "input_ids", "labels", "attention_mask", "position_ids", "seq_idx"
BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
LEAST = 64  # tokens: a smaller bucket would not run faster
Sizes = tuple[int, int, int]  # tokens, documents, longest


def fused_base(model: Any) -> FastBaseModel | None:
    """Return the base model of a fused model, also inside a PEFT wrapper; None if it cannot take packed rows."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:  # it inserts tokens before each row
            return None
        model = model.get_base_model()
    base = model.base_model if isinstance(model, PreTrainedModel) else None
    return base if isinstance(base, FastBaseModel) else None


def one_row(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Pack a collator's batch, on the CPU, into a single row of documents, as model inputs.

    Return None if training on that row would differ: inputs other than tokens, padding in the middle, labelled padding.
    """
    ids, labels, mask, positions, seq_idx = map(batch.get, ROWS)
    bounds = batch.keys() & BOUNDS
    if batch.keys() - BOUNDS - {*ROWS} or ids is None or ids.ndim != 2 or labels is None or len(bounds) not in (0, 4):
        return None
    shape = (ids.shape[0], ids.shape[1])
    if not all(x is None or is_of_rows(x, shape) for x in (labels, mask, positions, seq_idx)):
        return None
    targets = next_tokens(labels)
    layout = inspect_rows(shape, mask, positions, seq_idx, targets)
    unpadded = Unpadded.of(layout.keep, ids.device)
    packed_targets = unpadded.take(targets)
    if not layout.count or layout.has_holes or layout.labelled_padding or packed_targets[0, -1] != -100:
        return None
    cu_seqlens = batch["cu_seq_lens_q"].int() if bounds and mask is None else layout.cu_seqlens
    positions = layout.positions(ids.device) if positions is None else positions.expand(shape)
    return {
        "input_ids": unpadded.take(ids),
        "labels": F.pad(packed_targets[:, :-1], (1, 0), value=-100),  # undo the shift: targets back to labels
        "position_ids": unpadded.take(positions),
        "cu_seq_lens_q": cu_seqlens,
        "max_length_q": int(cu_seqlens.diff().max()),
    }


def sizes(row: Mapping[str, Any]) -> Sizes:
    """Return the sizes of a row from `one_row`."""
    return row["input_ids"].numel(), len(row["cu_seq_lens_q"]) - 1, row["max_length_q"]


def bucket_for(row: Sizes, made: list[Sizes]) -> Sizes:
    """Return the smallest of the existing buckets (`made`) that fits a row. If none fits, append a new one to `made`.

    The result depends on the arguments alone: ranks that make the same calls get the same buckets.
    """
    (tokens, documents, longest), step = row, max(LEAST, (1 << row[0].bit_length()) // 8)
    padded_tokens = -(-tokens // step) * step

    def with_padding(longest: int) -> int:
        """Return the number of documents, padding documents included."""
        return documents + -(-(padded_tokens - tokens) // longest)

    fits = [b for b in made if b[0] == padded_tokens and b[1] >= with_padding(b[2]) and b[2] >= longest]
    if not fits:  # a new bucket is at least as large as all earlier ones: such sizes will come again
        longest = max([LEAST, 1 << (longest - 1).bit_length(), *(b[2] for b in made)])
        fits = [(padded_tokens, max([-(-with_padding(longest) // 32) * 32, *(b[1] for b in made)]), longest)]
        made += fits
    return min(fits)


def pad_to_bucket(row: Mapping[str, Any], bucket: Sizes) -> dict[str, Any]:
    """Append padding to a row, so that it has the sizes of the bucket."""
    ids, positions, (tokens, documents, longest) = row["input_ids"], row["position_ids"], bucket
    row_tokens, row_documents, _ = sizes(row)
    added = (0, tokens - row_tokens)
    new_positions = torch.arange(tokens - row_tokens, device=ids.device)[None] % longest
    ends = (row_tokens + longest * torch.arange(1, documents - row_documents + 1, device=ids.device)).clamp(max=tokens)
    return {
        "input_ids": F.pad(ids, added),
        "labels": F.pad(row["labels"], added, value=-100),
        "position_ids": torch.cat([positions, new_positions.to(positions.dtype)], dim=1),
        "cu_seq_lens_q": torch.cat([row["cu_seq_lens_q"], ends.int()]),
        "max_length_q": longest,
        "attention_mask": F.pad(torch.ones_like(ids), added),
        "bucketed": True,
    }
