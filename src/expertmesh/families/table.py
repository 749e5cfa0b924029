"""The table of known code: which classes of Transformers become which twins, for every Mixture-of-Experts family.

The experts themselves and the head need no rule: experts enter through Transformers' `ExpertsInterface`, the head is
the model's output embedding (report.py). Rules of attention and of layers look at the norms inside a module, so they
come after the norms'; attention that no family knows gets a fast RoPE, which comes last.
"""

import sys
from typing import Any

from torch import nn

from expertmesh.families.deepseek_v3 import FastLatentAttention, why_not_mla
from expertmesh.families.gpt_oss import FastSinkAttention, why_not_sinks
from expertmesh.families.nemotron_h import why_not_mixer
from expertmesh.families.qwen3_moe import FastQKNormAttention, why_not_qk_norm
from expertmesh.families.rules import Rule, never
from expertmesh.layers.decoder import (
    FastDecoderLayer,
    FastGraniteDecoderLayer,
    FastHybridDecoderLayer,
    why_not_add_norm,
)
from expertmesh.layers.hybrid import FastNemotronHBlock, FastNemotronHMoEBlock
from expertmesh.layers.mamba2 import FastMamba2Mixer
from expertmesh.layers.mlp import FastReLU2MLP, FastSwiGLU, why_not_relu2, why_not_swiglu
from expertmesh.layers.norm import FastFloat32RMSNorm, FastOnePlusRMSNorm, FastRMSNorm
from expertmesh.layers.rope import FastInterleavedRoPE, FastRoPE, why_not_rope
from expertmesh.moe import block, router

ROPE = ("apply_rotary_pos_emb", "rotate_half")
SINKS = ("apply_rotary_pos_emb", "_apply_rotary_emb", "eager_attention_forward")
LATENT = ("expand_kv", "apply_rotary_pos_emb_interleave")
MAMBA2 = ("apply_mask_to_padding_states", "causal_conv1d_fn", "mamba2_chunk_scan")


def _layer(fast: Any, like: str, code: str, why_not: Any = why_not_add_norm) -> Rule:
    return Rule("add_norm", fast, like, code, why_not=why_not)


def _block(fast: Any, like: str, code: str, why_not: Any = never) -> Rule:
    return Rule("add_norm", fast, like, code, why_not=why_not, probed=False)


def _rope(fast: Any, like: str, code: str) -> Rule:
    return Rule("rope", fast, like, code, also=ROPE, calls=ROPE[0], why_not=why_not_rope, probed=False)


RULES = (
    Rule("rms_norm", FastRMSNorm, "qwen3_moe.Qwen3MoeRMSNorm", "d52135d2b29b"),
    Rule("rms_norm", FastFloat32RMSNorm, "gpt_oss.GptOssRMSNorm", "21c61ba6112f"),
    Rule("rms_norm", FastFloat32RMSNorm, "nemotron_h.NemotronHRMSNorm", "3b70f5568fad"),
    Rule("rms_norm", FastOnePlusRMSNorm, "qwen3_next.Qwen3NextRMSNorm", "6230aed131b0", also=("_norm",)),
    Rule("swiglu", FastSwiGLU, "qwen3_moe.Qwen3MoeMLP", "22d9f641d2af", why_not=why_not_swiglu),
    Rule("swiglu", FastReLU2MLP, "nemotron_h.NemotronHMLP", "d4bf579a3de9", why_not=why_not_relu2),
    Rule("router", router.FastSoftmaxRouter, "qwen3_moe.Qwen3MoeTopKRouter", "c08afa010190"),
    Rule("router", router.FastNormalizedSoftmaxRouter, "qwen3_5_moe.Qwen3_5MoeTopKRouter", "4466b6818575"),
    Rule("router", router.FastMixtralRouter, "mixtral.MixtralTopKRouter", "c2255326ddf6"),
    Rule("router", router.FastTopKSoftmaxRouter, "gpt_oss.GptOssTopKRouter", "cab650bd04b3"),
    Rule("router", router.FastGraniteRouter, "granitemoe.GraniteMoeTopKRouter", "3602d2719735"),
    Rule("router", router.FastErnieRouter, "ernie4_5_moe.Ernie4_5_MoeTopKRouter", "47188f81d518"),
    Rule("router", router.FastHunYuanRouter, "hunyuan_v1_moe.HunYuanMoEV1Gate", "ca681c3ae536"),
    Rule(
        "router",
        router.FastSigmoidRouter,
        "deepseek_v3.DeepseekV3TopkRouter",
        "49e4c6d91651",
        why_not=router.why_not_sigmoid,
    ),
    *(
        Rule("mla_rope", FastLatentAttention, like, "58dcfce7b057", also=LATENT, why_not=why_not_mla)
        for like in ("deepseek_v3.DeepseekV3Attention", "glm4_moe_lite.Glm4MoeLiteAttention")
    ),
    Rule(
        "sink_attention",
        FastSinkAttention,
        "gpt_oss.GptOssAttention",
        "fd662928bacc",
        also=SINKS,
        why_not=why_not_sinks,
    ),
    Rule(
        "qk_norm_rope",
        FastQKNormAttention,
        "qwen3_moe.Qwen3MoeAttention",
        "ab01336ffc67",
        also=ROPE,
        why_not=why_not_qk_norm,
    ),
    *(
        Rule("mamba2", FastMamba2Mixer, like, "9a702f2272e8", also=MAMBA2, why_not=why_not_mixer)
        for like in ("nemotron_h.NemotronHMamba2Mixer", "granitemoehybrid.GraniteMoeHybridMambaLayer")
    ),
    _layer(FastNemotronHBlock, "nemotron_h.NemotronHBlock", "38a8c88270bc", never),
    _layer(FastDecoderLayer, "qwen3_moe.Qwen3MoeDecoderLayer", "332212b51843"),
    _layer(FastDecoderLayer, "mixtral.MixtralDecoderLayer", "1ecb9b7e2686"),
    _layer(FastDecoderLayer, "gpt_oss.GptOssDecoderLayer", "f8a0d99a6bba"),
    _layer(FastGraniteDecoderLayer, "granitemoe.GraniteMoeDecoderLayer", "635a517dc9e8"),
    _layer(FastHybridDecoderLayer, "qwen3_next.Qwen3NextDecoderLayer", "538d4692e6cd"),
    _block(FastNemotronHMoEBlock, "nemotron_h.NemotronHMoE", "583798ea34f9"),
    _block(block.FastMoEBlock, "qwen3_moe.Qwen3MoeSparseMoeBlock", "70fb069151b5"),
    _block(block.FastMoEBlock, "mixtral.MixtralSparseMoeBlock", "8afc3ebd8fed", block.why_not_noisy),
    _block(block.FastMoEBlock, "olmoe.OlmoeSparseMoeBlock", "caa0c6ea1669"),
    _block(block.FastRouterMoEBlock, "gpt_oss.GptOssMLP", "3d3d9fe690f5"),
    _block(block.FastRouterMoEBlock, "granitemoe.GraniteMoeMoE", "87b73612cc25"),
    _block(block.FastSharedMoEBlock, "deepseek_v3.DeepseekV3MoE", "16e9c3000cd8"),
    _block(block.FastSharedMoEBlock, "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock", "8604e692394b"),
    _block(block.FastSharedMLPMoEBlock, "hunyuan_v1_moe.HunYuanMoEV1Moe", "b732303f7ebf"),
    _block(block.FastGatedSharedMoEBlock, "qwen2_moe.Qwen2MoeSparseMoeBlock", "72d5edaac713"),
    _rope(FastRoPE, "mixtral.MixtralAttention", "799063ae4b15"),
    _rope(FastRoPE, "qwen3_next.Qwen3NextAttention", "046be360974c"),
    _rope(FastInterleavedRoPE, "ernie4_5_moe.Ernie4_5_MoeAttention", "ab37fa6b6172"),
)


def has_sinks(model_class: Any) -> bool:
    """Whether this Transformers class has the causal attention with sinks that a rule replaces."""
    if model_class.config_class.model_type == "gpt_oss":  # however a later release writes it
        return True
    found = vars(sys.modules[model_class.__module__]).values()
    classes = [x for x in found if isinstance(x, type) and issubclass(x, nn.Module)]
    return any(rule.matches(cls) for rule in RULES if rule.fusion == "sink_attention" for cls in classes)
