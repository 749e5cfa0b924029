"""flash-attn-4's function that this project calls: its signature and its layout, computed by PyTorch in float32."""

import importlib.machinery
import math
import sys
import types

import torch

from expertmesh import backends
from expertmesh.kernels import flash_attention


def install(monkeypatch) -> list[dict]:
    """Let flash-attn-4 seem to be installed on a Hopper GPU, which the CPU plays; a row for each call that follows."""
    calls: list[dict] = []

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    ):  # fmt: skip
        B, S, NQ, D = q.shape
        assert k.shape[:2] == v.shape[:2] == (B, S) and k.shape[2] == v.shape[2] and k.shape[3] == D
        assert q.dtype == k.dtype == v.dtype and not NQ % k.shape[2] and causal and q.stride(-1) == k.stride(-1) == 1
        assert k.shape[2] == NQ or v.shape[3] == D, "GQA backward requires head_dim == head_dim_v"
        calls.append({"shape": tuple(q.shape), "dtype": q.dtype, "sinks": learnable_sink is not None})
        scale = D**-0.5 if softmax_scale is None else softmax_scale
        key, value = (x.float().repeat_interleave(NQ // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("brhd,bnhd->bhrn", q.float(), key) * scale
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
        lse = scores.logsumexp(-1)
        if learnable_sink is not None:
            assert learnable_sink.shape == (NQ,)
            lse = torch.logaddexp(lse, learnable_sink.float().view(1, NQ, 1))
        out = torch.einsum("bhrn,bnhd->brhd", (scores - lse[..., None]).exp(), value)
        return out.to(q.dtype).contiguous(), lse

    for name in ("flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        module.__dict__.update(flash_attn_func=flash_attn_func, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "has_flash_attention", lambda device: True)
    monkeypatch.setattr(flash_attention, "LENGTH", 2)
    return calls
