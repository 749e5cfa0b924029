"""Batches of changing lengths brought to few shapes, so that steps on them can be recorded (graphed.py).

Packed documents and padded rows become one row of documents, whose bounds are `cu_seq_lens_q`, and its sizes are
rounded up:

    tokens       to a multiple of a quarter of the power of two below, by documents of padding with label -100
    documents    to a multiple of 32, by empty documents at the end
    longest      the length that kernels are given (max_length_q), to a power of two

`attention_mask` marks the added tokens with 0, for the router's auxiliary loss and for token counts. Rows are laid out
on the CPU, in the collator (`one_row`), and filled up on the device, without a synchronization, once all ranks know
each other's sizes (`bucket_for`, `pad_to_bucket`).
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
LEAST = 64  # tokens: below that nothing is gained by fewer
Sizes = tuple[int, int, int]  # tokens, documents, longest


def fused_base(model: Any) -> FastBaseModel | None:
    """The base model of a fused model, or of PEFT's wrapper around one, if it finds documents and padding by itself."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:  # which puts tokens before each row
            return None
        model = model.get_base_model()
    base = model.base_model if isinstance(model, PreTrainedModel) else None
    return base if isinstance(base, FastBaseModel) else None


def one_row(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """A collator's batch, still on the CPU, as inputs of a model: one row of documents.

    None where the row would not train the same: inputs other than tokens, padding between tokens, labels on padding.
    """
    ids, labels, mask, positions, numbers = map(batch.get, ROWS)
    bounds = batch.keys() & BOUNDS
    if batch.keys() - BOUNDS - {*ROWS} or ids is None or ids.ndim != 2 or labels is None or len(bounds) not in (0, 4):
        return None
    shape = (ids.shape[0], ids.shape[1])
    if not all(x is None or is_of_rows(x, shape) for x in (labels, mask, positions, numbers)):
        return None
    targets = next_tokens(labels)
    found = inspect_rows(shape, mask, positions, numbers, targets)
    apart = Unpadded.of(found.keep, ids.device)
    wanted = apart.take(targets)
    if not found.count or found.has_holes or found.labelled_padding or wanted[0, -1] != -100:
        return None
    cu_seqlens = batch["cu_seq_lens_q"].int() if bounds and mask is None else found.cu_seqlens
    positions = found.positions(ids.device) if positions is None else positions.expand(shape)
    return {
        "input_ids": apart.take(ids),
        "labels": F.pad(wanted[:, :-1], (1, 0), value=-100),  # behind each token what it was to predict
        "position_ids": apart.take(positions),
        "cu_seq_lens_q": cu_seqlens,
        "max_length_q": int(cu_seqlens.diff().max()),
    }


def sizes(row: Mapping[str, Any]) -> Sizes:
    """Of what `one_row` made."""
    return row["input_ids"].numel(), len(row["cu_seq_lens_q"]) - 1, row["max_length_q"]


def bucket_for(row: Sizes, made: list[Sizes]) -> Sizes:
    """What such a row is filled up to: the smallest of the buckets that were `made` if one fits, else a new one among
    them. All ranks that ask for the same rows get the same answers.
    """
    (tokens, documents, longest), step = row, max(LEAST, (1 << row[0].bit_length()) // 8)
    full = -(-tokens // step) * step

    def padded(longest: int) -> int:
        """Documents, with those of padding."""
        return documents + -(-(full - tokens) // longest)

    fits = [each for each in made if each[0] == full and each[1] >= padded(each[2]) and each[2] >= longest]
    if not fits:  # what was large once will be so again
        longest = max([LEAST, 1 << (longest - 1).bit_length(), *(each[2] for each in made)])
        fits = [(full, max([-(-padded(longest) // 32) * 32, *(each[1] for each in made)]), longest)]
        made += fits
    return min(fits)


def pad_to_bucket(row: Mapping[str, Any], bucket: Sizes) -> dict[str, Any]:
    """The row with padding behind it, so that its sizes are those of the bucket."""
    ids, positions, (tokens, documents, longest) = row["input_ids"], row["position_ids"], bucket
    there, own, _ = sizes(row)
    added = (0, tokens - there)
    places = torch.arange(tokens - there, device=ids.device)[None] % longest
    ends = (there + longest * torch.arange(1, documents - own + 1, device=ids.device)).clamp(max=tokens)
    return {
        "input_ids": F.pad(ids, added),
        "labels": F.pad(row["labels"], added, value=-100),
        "position_ids": torch.cat([positions, places.to(positions.dtype)], dim=1),
        "cu_seq_lens_q": torch.cat([row["cu_seq_lens_q"], ends.int()]),
        "max_length_q": longest,
        "attention_mask": F.pad(torch.ones_like(ids), added),
        "bucketed": True,
    }
