"""flash-attn-4's functions that this project calls: their signatures and layouts, computed by PyTorch in float32."""

import importlib.machinery
import math
import sys
import types

import torch

from expertmesh import backends
from expertmesh.kernels import flash_attention
from expertmesh.kernels.documents import document_mask


def install(monkeypatch) -> list[dict]:
    """Let flash-attn-4 seem to be installed on a Hopper GPU, which the CPU plays; a row for each call that follows."""
    calls: list[dict] = []

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, *, seen=None,
    ):  # fmt: skip
        B, S, NQ, D = q.shape
        assert k.shape[:2] == v.shape[:2] == (B, S) and k.shape[2] == v.shape[2] and k.shape[3] == D
        assert q.dtype == k.dtype == v.dtype and not NQ % k.shape[2] and causal and q.stride(-1) == k.stride(-1) == 1
        assert k.shape[2] == NQ or v.shape[3] == D, "GQA backward requires head_dim == head_dim_v"
        calls.append(
            {"shape": tuple(q.shape), "dtype": q.dtype, "sinks": learnable_sink is not None, "window": window_size}
        )
        scale = D**-0.5 if softmax_scale is None else softmax_scale
        key, value = (x.float().repeat_interleave(NQ // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("brhd,bnhd->bhrn", q.float(), key) * scale
        unseen = torch.ones(S, S, dtype=torch.bool).triu(1) if seen is None else ~seen
        if window_size[0] is not None:  # so many keys before the query's own
            assert window_size[1] == 0
            unseen = unseen | torch.ones(S, S, dtype=torch.bool).tril(-1 - window_size[0])
        scores = scores.masked_fill(unseen, -math.inf)
        lse = scores.logsumexp(-1)
        if learnable_sink is not None:
            assert learnable_sink.shape == (NQ,)
            lse = torch.logaddexp(lse, learnable_sink.float().view(1, NQ, 1))
        out = torch.einsum("bhrn,bnhd->brhd", (scores - lse[..., None]).exp(), value)
        return out.to(q.dtype).contiguous(), lse

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q[-1] == len(q)
        assert cu_seqlens_q.diff().max() == max_seqlen_q and cu_seqlens_k.diff().max() == max_seqlen_k
        seen = document_mask(cu_seqlens_q, 1, len(q))[0, 0]
        options = {"softmax_scale": softmax_scale, "causal": causal, "learnable_sink": learnable_sink, "seen": seen}
        options["window_size"] = window_size
        out, lse = flash_attn_func(q[None], k[None], v[None], **options)
        calls[-1]["documents"] = len(cu_seqlens_q) - 1
        return out[0], lse[0]

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    for name in ("flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        module.__dict__.update(functions, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "FLASH_ATTENTION", True)
    monkeypatch.setattr(backends, "has_flash_attention", lambda device: True)
    monkeypatch.setattr(flash_attention, "LENGTH", 2)
    monkeypatch.setattr(flash_attention, "_set_cache_folder", lambda: None)
    return calls
