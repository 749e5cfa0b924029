"""Find packed documents and padding in the rows of a forward. The base model (base_model.py) does so once per call.

    inputs                              handling                                                     device syncs
    neither positions nor a mask        each row is one document                                     0
    cu_seq_lens_q and max_length_q      used as given                                                0
    cu_seq_lens_q with a mask, or       boundaries are given; padding and lengths are read           1
    without max_length_q
    position_ids or seq_idx             a document begins where positions do not increase by one     1
    attention_mask [B, S]               padding is removed: all other tokens form one packed row;    1
                                        hidden states get zeros for padding after the last layer

Transformers would build a mask [B, 1, S, S], for which SDPA has no fast kernel. Instead the layers get `documents` as a
keyword argument and an empty 4-d mask, which Transformers passes on as it is (`causal_placeholder` in attention.py).
Transformers' own code handles everything else: caches, user-defined masks, compilation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from expertmesh.kernels.documents import Documents

Mark = torch.Tensor | None


@dataclass(frozen=True)
class RowInfo:
    """The result of `inspect_rows`; its tensors are on the CPU.

    keep: bool [B, S], False for padding. cu_seqlens: offsets of documents among the kept tokens, ending with the number
    of kept tokens. labelled: number of positions with a target, None if there were no targets. labelled_padding:
    whether a padding position has a target.
    """

    keep: torch.Tensor
    cu_seqlens: torch.Tensor
    labelled: int | None
    labelled_padding: bool

    @property
    def has_holes(self) -> bool:
        """Whether some row has padding between tokens."""
        begins = torch.diff(self.keep.int(), prepend=torch.zeros(len(self.keep), 1, dtype=torch.int)) == 1
        return bool((begins.sum(1) > 1).any())

    @property
    def count(self) -> int:
        return len(self.cu_seqlens) - 1

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return positions [B, S], 0 at the first token of each row that is not padding."""
        first_B1 = self.keep.int().argmax(1, keepdim=True)
        return (torch.arange(self.keep.shape[1]) - first_B1).to(device, non_blocking=True)

    def documents(self, device: torch.device) -> Documents:
        return Documents(self.cu_seqlens.to(device, non_blocking=True), int(self.cu_seqlens.diff().max()))


def inspect_rows(shape: tuple[int, int], mask: Mark, positions: Mark, numbers: Mark, targets: Mark = None) -> RowInfo:
    """Find padding, documents and targets in rows of shape [B, S], with one copy from the device.

    mask [B, S]: 0 for padding. positions [B or 1, S]. numbers [B or 1, S]: document numbers, as in `seq_idx`.
    targets [B, S]: -100 for none. Without padding a document begins where positions do not increase by one; with
    padding, over which positions may jump, where they do not increase.
    """
    has_target = None if targets is None else targets != -100
    optional = {"mask": mask, "positions": positions, "numbers": numbers, "has_target": has_target}
    given = {name: x for name, x in optional.items() if x is not None}
    device = next(iter(given.values())).device
    stacked = torch.stack([x.expand(shape).to(device, torch.int32) for x in given.values()]).cpu()
    on_cpu = dict(zip(given, stacked, strict=True))
    keep = on_cpu["mask"] != 0 if mask is not None else torch.ones(shape, dtype=torch.bool)
    begins = keep & (keep.int().cumsum(1) == 1)
    if numbers is not None:
        begins |= keep & (on_cpu["numbers"] != _previous_kept(on_cpu["numbers"], keep))
    elif positions is not None and keep.all():
        begins[:, 1:] |= on_cpu["positions"].diff() != 1
    elif positions is not None:
        begins |= keep & (on_cpu["positions"] <= _previous_kept(on_cpu["positions"], keep))
    cu_seqlens = torch.cat([begins[keep].nonzero().flatten(), keep.sum()[None]]).int()
    if has_target is None:
        return RowInfo(keep, cu_seqlens, None, False)
    target_BS = on_cpu["has_target"] != 0
    return RowInfo(keep, cu_seqlens, int(target_BS.sum()), bool((target_BS & ~keep).any()))


def _previous_kept(x_BS: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return for each token the value of the previous kept token in its row, or -1 if there is none."""
    index = torch.where(keep, torch.arange(keep.shape[1]), -1).cummax(1).values
    index = torch.cat([torch.full((len(index), 1), -1), index[:, :-1]], dim=1)
    return torch.where(index < 0, -1, x_BS.gather(1, index.clamp(min=0)))


@dataclass(frozen=True)
class Unpadded:
    """Rows of shape [B, S] without their padding. `index` [T] holds the flat indices of the other tokens."""

    shape: tuple[int, int]
    index: torch.Tensor

    @classmethod
    def of(cls, keep: torch.Tensor, device: torch.device) -> "Unpadded":
        index = keep.flatten().nonzero().flatten()
        return cls((keep.shape[0], keep.shape[1]), index.to(device, non_blocking=True))

    def take(self, x: Any) -> Any:
        """Return a tensor [B, S, …] as [1, T, …], without padding, and anything else unchanged."""
        if not isinstance(x, torch.Tensor) or x.shape[:2] != self.shape:
            return x
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def restore(self, outputs: Any) -> Any:
        """Put zeros back for padding in a decoder's outputs: [1, T, …] to [B, S, …], and [T, E] to [B·S, E]."""
        return tree_map_only(torch.Tensor, self._restore, outputs)

    def _restore(self, x: torch.Tensor) -> torch.Tensor:
        T, (B, S) = len(self.index), self.shape
        if x.ndim > 2 and x.shape[:2] == (1, T):
            return x.new_zeros(B * S, *x.shape[2:]).index_copy(0, self.index, x[0]).unflatten(0, (B, S))
        if x.ndim == 2 and x.shape[0] == T:
            return x.new_zeros(B * S, x.shape[1]).index_copy(0, self.index, x)
        return x
