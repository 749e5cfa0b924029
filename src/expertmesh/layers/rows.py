"""What the rows of a forward hold: packed documents, and padding. The base model finds out once (base_model.py), with
one wait for the device at most.

    given                            what happens                                                            wait
    neither positions nor a mask     each row is one document                                                no
    cu_seq_lens_q, max_length_q      documents are where the collator says                                   no
    position_ids, seq_idx            a document begins wherever positions do not count on                    one
    cu_seq_lens_q and a mask         the same; and where the greatest length is missing                      one
    attention_mask [B, S]            rows are taken apart: tokens that are no padding become one row of      one
                                     documents; hidden states get padding back after the last layer

Transformers makes a mask [B, 1, S, S] of this, for which SDPA has no fast kernel. We pass an empty tensor of four
dimensions instead, which Transformers hands on (`causal_placeholder`, attention.py), and `documents` as a keyword.
Everything else (a cache, masks of the user's own, compilation) is left to Transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from expertmesh.kernels.documents import Documents

Mark = torch.Tensor | None


@dataclass(frozen=True)
class RowInfo:
    """What `inspect_rows` found, on the CPU.

    keep: [B, S], True where a token is no padding. cu_seqlens: where documents begin among the kept tokens, and their
    number. labelled: how many positions have something to predict, None if nobody asked; labelled_padding: whether
    padding is among them.
    """

    keep: torch.Tensor
    cu_seqlens: torch.Tensor
    labelled: int | None
    labelled_padding: bool

    @property
    def has_holes(self) -> bool:
        """Whether padding lies between the tokens of some row."""
        begins = torch.diff(self.keep.int(), prepend=torch.zeros(len(self.keep), 1, dtype=torch.int)) == 1
        return bool((begins.sum(1) > 1).any())

    @property
    def count(self) -> int:
        """How many documents there are."""
        return len(self.cu_seqlens) - 1

    def positions(self, device: torch.device) -> torch.Tensor:
        """[B, S], counted from the first token of each row that is no padding."""
        first_B1 = self.keep.int().argmax(1, keepdim=True)
        return (torch.arange(self.keep.shape[1]) - first_B1).to(device, non_blocking=True)

    def documents(self, device: torch.device) -> Documents:
        """As layers take them."""
        return Documents(self.cu_seqlens.to(device, non_blocking=True), int(self.cu_seqlens.diff().max()))


def inspect_rows(shape: tuple[int, int], mask: Mark, positions: Mark, numbers: Mark, targets: Mark = None) -> RowInfo:
    """Ask the device, once, what rows of this shape [B, S] hold.

    mask: 0 where a token is padding. positions: [B or 1, S]. numbers: of documents, as `seq_idx`, [B or 1, S]. Without
    padding a document begins wherever positions do not count on; with some, wherever they do not grow, as they may jump
    over it. targets: [B, S], -100 where there is nothing to predict.
    """
    wanted = None if targets is None else targets != -100
    all_four = {"mask": mask, "positions": positions, "numbers": numbers, "wanted": wanted}
    asked = {name: x for name, x in all_four.items() if x is not None}
    device = next(iter(asked.values())).device
    stacked = torch.stack([x.expand(shape).to(device, torch.int32) for x in asked.values()]).cpu()
    answers = dict(zip(asked, stacked, strict=True))
    keep = answers["mask"] != 0 if mask is not None else torch.ones(shape, dtype=torch.bool)
    begins = keep & (keep.int().cumsum(1) == 1)
    if numbers is not None:
        begins |= keep & (answers["numbers"] != _before(answers["numbers"], keep))
    elif positions is not None and keep.all():
        begins[:, 1:] |= answers["positions"].diff() != 1
    elif positions is not None:
        begins |= keep & (answers["positions"] <= _before(answers["positions"], keep))
    cu_seqlens = torch.cat([begins[keep].nonzero().flatten(), keep.sum()[None]]).int()
    if wanted is None:
        return RowInfo(keep, cu_seqlens, None, False)
    wanted_BS = answers["wanted"] != 0
    return RowInfo(keep, cu_seqlens, int(wanted_BS.sum()), bool((wanted_BS & ~keep).any()))


def _before(x_BS: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The value at the kept token before each one in its row; -1 where there is none."""
    index = torch.where(keep, torch.arange(keep.shape[1]), -1).cummax(1).values
    index = torch.cat([torch.full((len(index), 1), -1), index[:, :-1]], dim=1)
    return torch.where(index < 0, -1, x_BS.gather(1, index.clamp(min=0)))


@dataclass(frozen=True)
class Unpadded:
    """Rows of shape [B, S] taken apart: `index` [T] are their tokens that are no padding."""

    shape: tuple[int, int]
    index: torch.Tensor

    @classmethod
    def of(cls, keep: torch.Tensor, device: torch.device) -> "Unpadded":
        """From `RowInfo.keep`."""
        index = keep.flatten().nonzero().flatten()
        return cls((keep.shape[0], keep.shape[1]), index.to(device, non_blocking=True))

    def take(self, x: Any) -> Any:
        """[1, T, …] of a tensor [B, S, …]; anything else as it is."""
        if not isinstance(x, torch.Tensor) or x.shape[:2] != self.shape:
            return x
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def together(self, outputs: Any) -> Any:
        """Outputs of a decoder with [1, T, …] made [B, S, …] again, and router logits [T, E] made [B·S, E]: zero where
        padding is."""
        return tree_map_only(torch.Tensor, self._put, outputs)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        T, (B, S) = len(self.index), self.shape
        if x.ndim > 2 and x.shape[:2] == (1, T):
            return x.new_zeros(B * S, *x.shape[2:]).index_copy(0, self.index, x[0]).unflatten(0, (B, S))
        if x.ndim == 2 and x.shape[0] == T:
            return x.new_zeros(B * S, x.shape[1]).index_copy(0, self.index, x)
        return x
