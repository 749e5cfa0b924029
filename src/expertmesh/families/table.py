"""The table of rules that map Transformers classes to their twins, for all Mixture-of-Experts families.

Experts and the head need no rule: experts run through Transformers' `ExpertsInterface`, and the head is the model's
output embedding (report.py). The order matters: twins of attention and of layers require fused norms, so their rules
come after the norms. The RoPE rules come last, for attention classes without a twin. Families share code, so one rule
may serve several. Code without a rule is probed (probe.py).
"""

from dataclasses import dataclass
from typing import Any

from expertmesh.layers import attention, decoder, mamba2
from expertmesh.moe import block
from expertmesh.twins import fingerprint


@dataclass(frozen=True)
class Rule:
    """Modules whose code has the fingerprint `code` get the twin of the mixin `fast` if `fusion` is switched on.

    like: a Transformers class with this code, as "model_type.Class". It documents the rule, and a test checks its
    fingerprint. Mixins with `probed` are also tried on code without a rule.
    """

    fusion: str
    fast: Any
    like: str
    code: str

    def matches(self, cls: type) -> bool:
        """Whether the class has exactly the code that this rule replaces."""
        return fingerprint(cls, self.fast.stands_for) == self.code


RULES = (
    Rule("rms_norm", decoder.FastRMSNorm, "qwen3_moe.Qwen3MoeRMSNorm", "d52135d2b29b"),
    Rule("rms_norm", decoder.FastFloat32RMSNorm, "gpt_oss.GptOssRMSNorm", "21c61ba6112f"),
    Rule("rms_norm", decoder.FastFloat32RMSNorm, "nemotron_h.NemotronHRMSNorm", "3b70f5568fad"),
    Rule("rms_norm", decoder.FastOnePlusRMSNorm, "qwen3_next.Qwen3NextRMSNorm", "6230aed131b0"),
    Rule("swiglu", decoder.FastSwiGLU, "qwen3_moe.Qwen3MoeMLP", "22d9f641d2af"),
    Rule("swiglu", decoder.FastReLU2MLP, "nemotron_h.NemotronHMLP", "d4bf579a3de9"),
    Rule("router", block.FastSoftmaxRouter, "qwen3_moe.Qwen3MoeTopKRouter", "c08afa010190"),
    Rule("router", block.FastNormalizedSoftmaxRouter, "qwen3_5_moe.Qwen3_5MoeTopKRouter", "4466b6818575"),
    Rule("router", block.FastMixtralRouter, "mixtral.MixtralTopKRouter", "c2255326ddf6"),
    Rule("router", block.FastTopKSoftmaxRouter, "gpt_oss.GptOssTopKRouter", "cab650bd04b3"),
    Rule("router", block.FastGraniteRouter, "granitemoe.GraniteMoeTopKRouter", "3602d2719735"),
    Rule("router", block.FastErnieRouter, "ernie4_5_moe.Ernie4_5_MoeTopKRouter", "47188f81d518"),
    Rule("router", block.FastHunYuanRouter, "hunyuan_v1_moe.HunYuanMoEV1Gate", "ca681c3ae536"),
    Rule("router", block.FastSigmoidRouter, "deepseek_v3.DeepseekV3TopkRouter", "49e4c6d91651"),
    Rule("mla_rope", attention.FastLatentAttention, "deepseek_v3.DeepseekV3Attention", "58dcfce7b057"),
    Rule("mla_rope", attention.FastLatentAttention, "glm4_moe_lite.Glm4MoeLiteAttention", "58dcfce7b057"),
    Rule("sink_attention", attention.FastSinkAttention, "gpt_oss.GptOssAttention", "fd662928bacc"),
    Rule("qk_norm_rope", attention.FastQKNormAttention, "qwen3_moe.Qwen3MoeAttention", "ab01336ffc67"),
    Rule("mamba2", mamba2.FastMamba2Mixer, "nemotron_h.NemotronHMamba2Mixer", "9a702f2272e8"),
    Rule("mamba2", mamba2.FastMamba2Mixer, "granitemoehybrid.GraniteMoeHybridMambaLayer", "9a702f2272e8"),
    Rule("add_norm", decoder.FastNemotronHBlock, "nemotron_h.NemotronHBlock", "38a8c88270bc"),
    Rule("add_norm", decoder.FastNemotronHMoEBlock, "nemotron_h.NemotronHMoE", "583798ea34f9"),
    Rule("add_norm", decoder.FastDecoderLayer, "qwen3_moe.Qwen3MoeDecoderLayer", "332212b51843"),
    Rule("add_norm", decoder.FastDecoderLayer, "mixtral.MixtralDecoderLayer", "1ecb9b7e2686"),
    Rule("add_norm", decoder.FastDecoderLayer, "gpt_oss.GptOssDecoderLayer", "f8a0d99a6bba"),
    Rule("add_norm", decoder.FastGraniteDecoderLayer, "granitemoe.GraniteMoeDecoderLayer", "635a517dc9e8"),
    Rule("add_norm", decoder.FastHybridDecoderLayer, "qwen3_next.Qwen3NextDecoderLayer", "538d4692e6cd"),
    Rule("add_norm", block.FastMoEBlock, "qwen3_moe.Qwen3MoeSparseMoeBlock", "70fb069151b5"),
    Rule("add_norm", block.FastMoEBlock, "mixtral.MixtralSparseMoeBlock", "8afc3ebd8fed"),
    Rule("add_norm", block.FastMoEBlock, "olmoe.OlmoeSparseMoeBlock", "caa0c6ea1669"),
    Rule("add_norm", block.FastRouterMoEBlock, "gpt_oss.GptOssMLP", "3d3d9fe690f5"),
    Rule("add_norm", block.FastRouterMoEBlock, "granitemoe.GraniteMoeMoE", "87b73612cc25"),
    Rule("add_norm", block.FastSharedMoEBlock, "deepseek_v3.DeepseekV3MoE", "16e9c3000cd8"),
    Rule("add_norm", block.FastSharedMoEBlock, "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock", "8604e692394b"),
    Rule("add_norm", block.FastSharedMLPMoEBlock, "hunyuan_v1_moe.HunYuanMoEV1Moe", "b732303f7ebf"),
    Rule("add_norm", block.FastGatedSharedMoEBlock, "qwen2_moe.Qwen2MoeSparseMoeBlock", "72d5edaac713"),
    Rule("rope", attention.FastRoPE, "mixtral.MixtralAttention", "799063ae4b15"),
    Rule("rope", attention.FastRoPE, "qwen3_next.Qwen3NextAttention", "046be360974c"),
    Rule("rope", attention.FastInterleavedRoPE, "ernie4_5_moe.Ernie4_5_MoeAttention", "ab37fa6b6172"),
)
