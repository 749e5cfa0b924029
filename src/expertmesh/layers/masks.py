"""Masks without waiting for the device, and none at all where documents are packed.

Transformers looks at `position_ids` in every forward, on the device, to find out whether several documents are packed
into a row: the CPU waits for the GPU. If they are, it makes a mask [B, 1, S, S], for which SDPA has no fast kernel. A
fused model's forward knows more (`known_rows`). No `position_ids`: nothing is packed, and nobody looks. A collator that
passes `cu_seq_lens_q` and `max_length_q` with them has said where the documents are. Otherwise they are looked for, as
ever, with one wait. On GPUs packed rows get their `Documents` in place of a mask, which attention.py understands.
Everything else, and every model outside such a forward, gets Transformers' masks.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils
from transformers.utils.generic import is_flash_attention_requested

from expertmesh import backends
from expertmesh.kernels.documents import Bounds, Documents, document_bounds, document_of, document_of_positions
from expertmesh.kernels.sink_attention import Padding, padding_of

#: our implementation of attention with sinks, as an `attn_implementation` (sinks.py)
SINKS = "expertmesh-sinks"


@dataclass
class _Rows:
    """What is known about the rows of one forward. `packed` passes from the question to the mask made of its answer:
    the documents, and the positions in them. `bounds`: the documents for attention with sinks, once they are made.
    """

    unpacked: bool
    given: Documents | None
    positions: torch.Tensor | None
    packed: tuple[Documents, torch.Tensor] | None = None
    bounds: Bounds | None = None


_rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)
_look = masking_utils.find_packed_sequence_indices


@contextlib.contextmanager
def known_rows(model: Any, positions: torch.Tensor | None, inputs: dict[str, Any]) -> Iterator[None]:
    """One forward of `model` on `inputs`; without `positions` rows are known to hold one document each."""
    # FlashAttention's integrations find the documents themselves, and their mask has no use for the answer
    unpacked = positions is None or is_flash_attention_requested(model.config.get_text_config())
    token = _rows.set(_Rows(unpacked, _given(inputs), positions) if unpacked or _takes_documents(model) else None)
    try:
        yield
    finally:
        _rows.reset(token)


def _takes_documents(model: Any) -> bool:
    """Whether all attention of this model passes its mask on to SDPA unseen: so do those that FlashAttention fits."""
    config = model.config
    causal_text = getattr(config, "is_causal", True) and config.get_text_config() is config
    chosen = config._attn_implementation
    return causal_text and model._supports_flash_attn and chosen in ("sdpa", SINKS)


def _given(inputs: dict[str, Any]) -> Documents | None:
    cu_seqlens, max_length = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
    return None if cu_seqlens is None or max_length is None else Documents(cu_seqlens.int(), int(max_length))


def find_documents(position_ids: torch.Tensor) -> Documents:
    """The documents in rows [B, S] of positions: one begins wherever they do not count on. Waits for the device."""
    positions = position_ids.cpu()
    starts = torch.diff(positions, prepend=positions[:, :1]) != 1
    cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([positions.numel()])]).int()
    return Documents(cu_seqlens.to(position_ids.device, non_blocking=True), int(cu_seqlens.diff().max()))


def _find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Within `known_rows` the answer is none, and the mask that Transformers then asks for knows better."""
    rows = _rows.get()
    if rows is None or (not rows.unpacked and torch.compiler.is_compiling()):
        return _look(position_ids)
    if not rows.unpacked:
        documents = rows.given or find_documents(position_ids)
        if len(documents.cu_seqlens) > len(position_ids) + 1:  # more of them than rows
            rows.packed = documents, position_ids
    return None


def _sdpa_mask(*args: Any, **asked: Any) -> Any:
    """Transformers' mask for SDPA, or `Documents`. What else than documents bounds (windows, chunks) needs a mask."""
    rows = _rows.get()
    if rows is None or rows.packed is None:
        return masking_utils.sdpa_mask(*args, **asked)
    (documents, position_ids), rows.packed = rows.packed, None
    causal = asked["mask_function"] is masking_utils.causal_mask_function and asked["allow_is_causal_skip"]
    device, dtype = asked["device"], asked["dtype"]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if causal and backends.has_varlen(device, dtype):
        return documents
    asked["mask_function"] = masking_utils.packed_sequence_compatibility_function(
        asked["mask_function"], position_ids, document_of(documents.cu_seqlens, *position_ids.shape)
    )
    return masking_utils.sdpa_mask(**asked | {"allow_is_causal_skip": False})


def _sinks_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **asked: Any,
) -> torch.Tensor | Bounds | Padding | None:
    """What our attention with sinks needs to know beside causality and windows, or Transformers' eager mask.

    GPT-OSS's own masks let packed documents see each other.
    """
    whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if not whole or asked["use_vmap"] or not asked["allow_is_causal_skip"]:
        return masking_utils.eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **asked
        )
    if attention_mask is not None:
        return padding_of(attention_mask[:, :kv_length])
    rows = _rows.get()
    if rows is None or rows.unpacked or rows.positions is None:
        return None
    if rows.bounds is None:
        given, positions = rows.given, rows.positions.expand(batch_size, -1)
        number = document_of(given.cu_seqlens, *positions.shape) if given else document_of_positions(positions)
        rows.bounds = document_bounds(number)._replace(told=given if batch_size == 1 else None)
    return rows.bounds


masking_utils.find_packed_sequence_indices = _find_packed_sequence_indices
masking_utils.AttentionMaskInterface.register("sdpa", _sdpa_mask)
masking_utils.AttentionMaskInterface.register(SINKS, _sinks_mask)
