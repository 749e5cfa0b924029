"""The table for every Mixture-of-Experts family of Transformers: classes recognised by the code they run.

The experts themselves and the head need no rule: experts enter through Transformers' `ExpertsInterface`, the head is
the model's output embedding (fuse.py).
"""

from expertmesh.families import deepseek_v3, gpt_oss, nemotron_h, qwen3_moe
from expertmesh.families.rules import Rule, never
from expertmesh.layers.decoder import (
    FastDecoderLayer,
    FastGraniteDecoderLayer,
    FastHybridDecoderLayer,
    why_not_add_norm,
)
from expertmesh.layers.mlp import FastSwiGLU, why_not_swiglu
from expertmesh.layers.norm import FastFloat32RMSNorm, FastOnePlusRMSNorm, FastRMSNorm
from expertmesh.layers.rope import FastInterleavedRoPE, FastRoPE, why_not_rope
from expertmesh.moe.block import (
    FastGatedSharedMoEBlock,
    FastMoEBlock,
    FastRouterMoEBlock,
    FastSharedMLPMoEBlock,
    FastSharedMoEBlock,
    why_not_noisy,
)
from expertmesh.moe.router import (
    FastErnieRouter,
    FastGraniteRouter,
    FastHunYuanRouter,
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
    Rule("router", FastGraniteRouter, like=("granitemoe.GraniteMoeTopKRouter",), code=("3602d2719735",)),
    Rule("router", FastErnieRouter, like=("ernie4_5_moe.Ernie4_5_MoeTopKRouter",), code=("47188f81d518",)),
    Rule("router", FastHunYuanRouter, like=("hunyuan_v1_moe.HunYuanMoEV1Gate",), code=("ca681c3ae536",)),
    Rule(
        "router",
        FastSigmoidRouter,
        like=("deepseek_v3.DeepseekV3TopkRouter",),
        code=("49e4c6d91651",),
        why_not=why_not_sigmoid,
    ),
)

LAYERS = (
    (FastDecoderLayer, "qwen3_moe.Qwen3MoeDecoderLayer", "332212b51843", why_not_add_norm),
    (FastDecoderLayer, "mixtral.MixtralDecoderLayer", "1ecb9b7e2686", why_not_add_norm),
    (FastDecoderLayer, "gpt_oss.GptOssDecoderLayer", "f8a0d99a6bba", why_not_add_norm),
    (FastGraniteDecoderLayer, "granitemoe.GraniteMoeDecoderLayer", "635a517dc9e8", why_not_add_norm),
    (FastHybridDecoderLayer, "qwen3_next.Qwen3NextDecoderLayer", "538d4692e6cd", why_not_add_norm),
    (FastMoEBlock, "qwen3_moe.Qwen3MoeSparseMoeBlock", "70fb069151b5", never),
    (FastMoEBlock, "mixtral.MixtralSparseMoeBlock", "8afc3ebd8fed", why_not_noisy),
    (FastMoEBlock, "olmoe.OlmoeSparseMoeBlock", "caa0c6ea1669", never),
    (FastRouterMoEBlock, "gpt_oss.GptOssMLP", "3d3d9fe690f5", never),
    (FastRouterMoEBlock, "granitemoe.GraniteMoeMoE", "87b73612cc25", never),
    (FastSharedMoEBlock, "deepseek_v3.DeepseekV3MoE", "16e9c3000cd8", never),
    (FastSharedMoEBlock, "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock", "8604e692394b", never),
    (FastSharedMLPMoEBlock, "hunyuan_v1_moe.HunYuanMoEV1Moe", "b732303f7ebf", never),
    (FastGatedSharedMoEBlock, "qwen2_moe.Qwen2MoeSparseMoeBlock", "72d5edaac713", never),
)
LAYER_RULES = tuple(
    Rule("add_norm", fast, (like,), (code,), why_not=why_not, probed=not issubclass(fast, FastMoEBlock))
    for fast, like, code, why_not in LAYERS
)

ROPES = (
    (FastRoPE, "mixtral.MixtralAttention", "799063ae4b15"),
    (FastRoPE, "qwen3_next.Qwen3NextAttention", "046be360974c"),
    (FastInterleavedRoPE, "ernie4_5_moe.Ernie4_5_MoeAttention", "ab37fa6b6172"),
)
ROPE_RULES = tuple(
    Rule(
        "rope",
        fast,
        (like,),
        (code,),
        also=("apply_rotary_pos_emb", "rotate_half"),
        calls="apply_rotary_pos_emb",
        why_not=why_not_rope,
        probed=False,
    )
    for fast, like, code in ROPES
)

# a family's own rules and those of layers look at the norms inside a module, so they come after the norms' rules;
# attention that no family knows gets a fast RoPE
FAMILY_RULES = (*deepseek_v3.RULES, *gpt_oss.RULES, *qwen3_moe.RULES, *nemotron_h.RULES)
RULES = (*NORM_RULES, *MLP_RULES, *ROUTER_RULES, *FAMILY_RULES, *LAYER_RULES, *ROPE_RULES)
