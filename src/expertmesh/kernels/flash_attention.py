"""Causal attention for training on Hopper with flash-attn-4, if installed. Only this file uses its interface.

flash-attn-4 (BSD-3, CuTe-DSL, compiled at the first call) is faster there than the cuDNN kernel that SDPA picks, and
than `varlen_attn` on packed documents. It supports sinks and windows. Its backward sums dq with atomics, and with
grouped queries dk and dv too, so gradients differ between runs by rounding. With deterministic algorithms enabled in
PyTorch, other kernels run instead. A call does not synchronize with the device.

Letters: B batch, S sequence, N heads (NQ of queries, NK of keys), D width of queries and keys, V of values.
"""

import logging
import os
import tempfile
from functools import cache

import torch

from expertmesh import backends
from expertmesh.kernels.documents import Documents

log = logging.getLogger(__name__)
_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE"
#: (D, V) with which it was the fastest on an H200; an empty set disables it
WIDTHS = frozenset({(64, 64), (128, 128), (192, 128)})
DTYPES = (torch.bfloat16, torch.float16)
#: shortest sequence; on shorter ones the call costs more CPU time than the GPU saves
LENGTH = 1024


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `flash_attention` should run on these inputs: 16-bit floats (also by autocast) on Hopper, widths in
    `WIDTHS`, equally many queries and keys, at least `LENGTH`, with gradients, and no deterministic algorithms.

    query: [B, NQ, S, D], key: [B, NK, S, D], value: [B, NK, S, V].
    """
    width = query.shape[-1]
    return (
        (width, value.shape[-1]) in WIDTHS
        and backends.has_flash_attention(query.device.type)
        and not backends.in_fullgraph()
        and backends.matmul_dtype(query) in DTYPES
        and query.shape[2] == key.shape[2]
        and query.shape[2] >= LENGTH
        and (width == value.shape[-1] or query.shape[1] == key.shape[1])  # its backward has no GQA if D != V
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and not torch.are_deterministic_algorithms_enabled()
    )


@torch.compiler.disable
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    documents: Documents | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return attention [B, S, NQ, V] in the inputs' dtype, or autocast's. Differentiable in all tensors.

    Shapes as in `supports`; no copy if the last dimension is contiguous. scale None: 1 / sqrt(D). sinks: [NQ] logits.
    documents: none attends to another. window: a query attends to itself and the window - 1 tokens before it.
    """
    _set_cache_folder()
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    dtype = backends.matmul_dtype(query)
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    limits = (None, None) if window is None else (window - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "learnable_sink": sinks, "window_size": limits}
    if documents is None:
        return flash_attn_func(query, key, value, **options)[0]
    rows = query.shape[:2]
    options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.cu_seqlens)
    options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.max_length)
    out, _ = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (query, key, value)), **options)
    return out.unflatten(0, rows)


@cache
def _set_cache_folder() -> None:
    """Make flash-attn-4 cache its compiled kernels on disk for later processes, unless the user has configured this."""
    if f"{_CACHE}_DIR" not in os.environ:
        folder = os.path.join(tempfile.gettempdir(), f"flash-attn-4-{os.getuid()}")
        os.makedirs(folder, 0o700, exist_ok=True)
        if os.lstat(folder).st_uid != os.getuid():  # do not load code that another user put there
            log.warning("%s is not yours: flash-attn-4 recompiles at every start. Set %s_DIR.", folder, _CACHE)
            return
        os.environ[f"{_CACHE}_DIR"] = folder
    os.environ.setdefault(f"{_CACHE}_ENABLED", "1")
