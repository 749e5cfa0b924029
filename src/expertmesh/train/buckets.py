"""Batches of changing lengths brought to few shapes, so that steps on them can be recorded (graphed.py).

Packed documents and padded rows become one row of documents, whose bounds are `cu_seq_lens_q`, and its sizes are
rounded up:

    tokens       to a multiple of a quarter of the power of two below, by documents of padding with label -100
    documents    to a multiple of 32, by empty documents at the end
    longest      the length that kernels are given (max_length_q), to a power of two

`attention_mask` marks the added tokens with 0, for the router's auxiliary loss and for token counts. Rows are laid out
on the CPU, in the collator (`one_row`), and filled up on the device, without a synchronization, once all ranks know
each other's sizes (`Buckets`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from expertmesh.layers.base_model import FastBaseModel
from expertmesh.layers.head import next_tokens
from expertmesh.layers.rows import Apart, look

ROWS = {"input_ids", "labels", "attention_mask", "position_ids", "seq_idx"}
BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
LEAST = 64  # tokens: below that nothing is gained by fewer


def fused_base(model: Any) -> FastBaseModel | None:
    """The base model of a fused model, or of PEFT's wrapper around one, if it finds documents and padding by itself."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:  # which puts tokens before each row
            return None
        model = model.get_base_model()
    base = model.base_model if isinstance(model, PreTrainedModel) else None
    return base if isinstance(base, FastBaseModel) else None


class Row(NamedTuple):
    """A batch of T tokens as one row of documents. `full`: its rows held one document each, and no padding."""

    input_ids: torch.Tensor  # [1, T]
    labels: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    cu_seqlens: torch.Tensor  # [documents + 1] int32
    longest: int
    full: bool

    def inputs(self) -> dict[str, Any]:
        """As inputs of a model."""
        inputs = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.cu_seqlens)
        return inputs | bounds | dict.fromkeys(("max_length_q", "max_length_k"), self.longest)


def one_row(batch: Mapping[str, Any]) -> Row | None:
    """A collator's batch, still on the CPU, as a `Row`.

    None where the row would not train the same: inputs other than tokens, padding between tokens, labels on padding.
    """
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    bounds = batch.keys() & BOUNDS
    if batch.keys() - ROWS - BOUNDS or ids is None or ids.ndim != 2 or labels is None or (bounds and bounds != BOUNDS):
        return None
    shape, positions = (ids.shape[0], ids.shape[1]), batch.get("position_ids")
    others = [x for x in (labels, mask, positions, batch.get("seq_idx")) if x is not None]
    if any(
        not torch.is_tensor(x) or x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0])
        for x in others
    ):
        return None
    targets = next_tokens(labels)
    found = look(shape, mask, positions, batch.get("seq_idx"), targets)
    documents = found.documents(ids.device) if found.count else None
    if documents is None or found.has_holes or found.labelled_padding:
        return None
    cu_seqlens = batch["cu_seq_lens_q"].int() if bounds and mask is None else documents.cu_seqlens
    apart = Apart.of(found.keep, ids.device)
    positions = found.positions(ids.device) if positions is None else positions.expand(shape)
    wanted = apart.take(targets)
    if wanted[0, -1] != -100:
        return None
    labels = F.pad(wanted[:, :-1], (1, 0), value=-100)  # behind each token what it was to predict
    full = bool(found.keep.all()) and len(cu_seqlens) == shape[0] + 1
    return Row(apart.take(ids), labels, apart.take(positions), cu_seqlens, int(cu_seqlens.diff().max()), full)


class Bucket(NamedTuple):
    """What rows are filled up to."""

    tokens: int
    documents: int
    longest: int

    def holds(self, tokens: int, documents: int, longest: int) -> bool:
        """Whether such a row fits, and the documents of padding behind it."""
        padding = -(-(self.tokens - tokens) // self.longest)
        return tokens <= self.tokens and longest <= self.longest and documents + padding <= self.documents

    def fill(self, row: Row) -> dict[str, Any]:
        """The row as inputs of a model."""
        tokens, device = row.input_ids.shape[1], row.input_ids.device
        added, empty = self.tokens - tokens, self.documents + 1 - len(row.cu_seqlens)
        place = torch.arange(added, device=device)[None] % self.longest
        ends = (tokens + self.longest * torch.arange(1, empty + 1, device=device)).clamp(max=self.tokens)
        filled = row._replace(
            input_ids=F.pad(row.input_ids, (0, added)),
            labels=F.pad(row.labels, (0, added), value=-100),
            position_ids=torch.cat([row.position_ids, place.to(row.position_ids.dtype)], dim=1),
            cu_seqlens=torch.cat([row.cu_seqlens, ends.int()]),
            longest=self.longest,
        )
        return filled.inputs() | {"attention_mask": F.pad(torch.ones_like(row.input_ids), (0, added))}


class Buckets:
    """The buckets of a run. All ranks that ask for the same rows get the same answers."""

    def __init__(self) -> None:
        self.made: list[Bucket] = []

    def of(self, tokens: int, documents: int, longest: int) -> Bucket:
        """The bucket for such a row: of those at hand the smallest that wastes no more than a new one might."""
        step = max(LEAST, 1 << max(tokens.bit_length() - 3, 0))
        size = -(-tokens // step) * step
        fits = [bucket for bucket in self.made if bucket.tokens <= size and bucket.holds(tokens, documents, longest)]
        if fits:
            return min(fits)
        # what was large once will be so again
        longest = max([LEAST, 1 << (longest - 1).bit_length(), *(bucket.longest for bucket in self.made)])
        documents += -(-(size - tokens) // longest)
        bucket = Bucket(size, max([-(-documents // 32) * 32, *(b.documents for b in self.made)]), longest)
        self.made.append(bucket)
        return bucket
