"""The table for every Mixture-of-Experts family of Transformers: classes recognised by the code they run.

The experts themselves and the head need no rule: experts enter through Transformers' `ExpertsInterface`, the head is
the model's output embedding (fuse.py).
"""

from expertmesh.families import qwen3_moe
from expertmesh.families.rules import Rule
from expertmesh.layers.mlp import FastSwiGLU, why_not_swiglu
from expertmesh.layers.norm import FastFloat32RMSNorm, FastOnePlusRMSNorm, FastRMSNorm
from expertmesh.layers.router import (
    FastMixtralRouter,
    FastNormalizedSoftmaxRouter,
    FastSigmoidRouter,
    FastSoftmaxRouter,
    FastTopKSoftmaxRouter,
    why_not_sigmoid,
)

NORM_RULES = (
    Rule("rms_norm", FastRMSNorm, like=("qwen3_moe.Qwen3MoeRMSNorm",), code=("d52135d2b29b",)),
    Rule(
        "rms_norm",
        FastFloat32RMSNorm,
        like=("gpt_oss.GptOssRMSNorm", "nemotron_h.NemotronHRMSNorm"),
        code=("21c61ba6112f", "3b70f5568fad"),
    ),
    Rule(
        "rms_norm",
        FastOnePlusRMSNorm,
        like=("qwen3_next.Qwen3NextRMSNorm",),
        code=("6230aed131b0",),
        also=("_norm",),
    ),
)

MLP_RULES = (
    Rule("swiglu", FastSwiGLU, like=("qwen3_moe.Qwen3MoeMLP",), code=("22d9f641d2af",), why_not=why_not_swiglu),
)

ROUTER_RULES = (
    Rule("router", FastSoftmaxRouter, like=("qwen3_moe.Qwen3MoeTopKRouter",), code=("c08afa010190",)),
    Rule("router", FastNormalizedSoftmaxRouter, like=("qwen3_5_moe.Qwen3_5MoeTopKRouter",), code=("4466b6818575",)),
    Rule("router", FastMixtralRouter, like=("mixtral.MixtralTopKRouter",), code=("c2255326ddf6",)),
    Rule("router", FastTopKSoftmaxRouter, like=("gpt_oss.GptOssTopKRouter",), code=("cab650bd04b3",)),
    Rule(
        "router",
        FastSigmoidRouter,
        like=("deepseek_v3.DeepseekV3TopkRouter",),
        code=("49e4c6d91651",),
        why_not=why_not_sigmoid,
    ),
)

# a family's own rules look at the norms inside a module, so they come after the norms' rules
RULES = (*NORM_RULES, *MLP_RULES, *ROUTER_RULES, *qwen3_moe.RULES)
