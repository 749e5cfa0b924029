"""Fast twins of RMSNorms, dense MLPs and pre-norm decoder layers. Other kernels also do the layers' residual adds.

One kernel does the add after attention and the norm that follows. The experts' last kernel does the second add if the
block supports it. In the backward the kernel of each norm also adds the gradient of the residual connection.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation, SiLUActivation

from expertmesh.backends import graph_break, warn_once
from expertmesh.kernels.activation import relu2, swiglu
from expertmesh.kernels.rms_norm import Scale, add_rms_norm, rms_norm
from expertmesh.layers.lora import lora_linears
from expertmesh.moe.block import FastMoEBlock, FastSharedMoEBlock, add_scaled, stock_block
from expertmesh.twins import Fast, is_unmodified, pop_cache


class FastRMSNorm(Fast):
    """`weight * x_hat.to(dtype)`: Llama, Qwen, DeepSeek, Mixtral …"""

    scale: Scale = "rounded"
    eps_name = "variance_epsilon"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, getattr(self, self.eps_name), scale=self.scale)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm(x + residual), x + residual), from one kernel. Without a residual the sum is x."""
        return add_rms_norm(x, residual, self.weight, getattr(self, self.eps_name), scale=self.scale)


class FastFloat32RMSNorm(FastRMSNorm):
    """`(weight * x_hat).to(dtype)` in float32: GPT-OSS, Nemotron."""

    scale: Scale = "float32"


class FastOnePlusRMSNorm(FastRMSNorm):
    """`((1 + weight) * x_hat).to(dtype)` in float32: Qwen3-Next, Qwen3.5."""

    stands_for = ("forward", "_norm")
    scale: Scale = "one_plus"
    eps_name = "eps"


class FastSwiGLU(Fast):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    activations: tuple[type, ...] = (SiLUActivation, nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_unmodified(self.act_fn, kind=self.activations):  # replaced or hooked after fusing
            return super().forward(x)
        return self.down_proj(self._activated(x))

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(*lora_linears(x, self.gate_proj, self.up_proj))

    @classmethod
    def why_not(cls, mlp: Any) -> str | None:
        name = type(mlp.act_fn).__name__
        fits = is_unmodified(mlp.act_fn, kind=cls.activations)
        return None if fits else f"its activation is {name}, not {cls.activations[0].__name__} without hooks"


class FastReLU2MLP(FastSwiGLU):
    """down_proj(relu(up_proj(x))^2)."""

    activations = (ReLUSquaredActivation,)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return relu2(self.up_proj(x))


class FastDecoderLayer(Fast):
    """Must equal `Qwen3MoeDecoderLayer.forward`, `MixtralDecoderLayer.forward` and `GptOssDecoderLayer.forward`."""

    block_name = "mlp"
    residual_multiplier = 1.0  # scales the outputs of attention and block before the residual adds

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        if args or not is_unmodified(first, second, kind=FastRMSNorm):  # replaced or hooked after fusing
            warn_once(f"{type(self).__name__} runs Transformers' code: a norm changed, or it got positional arguments.")
            return super().forward(hidden_states, *args, **kwargs)
        normed, residual = first.add_norm(hidden_states)
        mixed, scale = self._mix(normed, kwargs), self.residual_multiplier
        normed, residual = second.add_norm(mixed if scale == 1 else mixed * scale, residual)
        return add_block(getattr(self, self.block_name), normed, residual, scale)

    def _mix(self, normed: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the attention output, which is added to the residual before the second norm."""
        required = {"attention_mask": None, "position_embeddings": None}
        return self.self_attn(hidden_states=normed, **required | kwargs)[0]

    @staticmethod
    def why_not(layer: Any) -> str | None:
        fits = is_unmodified(layer.input_layernorm, layer.post_attention_layernorm, kind=FastRMSNorm)
        return None if fits else "the norms before and after its attention are not fused RMSNorms"


class FastHybridDecoderLayer(FastDecoderLayer):
    """Must equal `Qwen3NextDecoderLayer.forward`, with linear or full attention."""

    def _mix(self, normed: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if self.block_type == "full_attention":
            return super()._mix(normed, kwargs)
        for name in ("position_embeddings", "position_ids"):
            kwargs.pop(name, None)
        return self.linear_attn(normed, pop_cache(kwargs), **kwargs)


class FastGraniteDecoderLayer(FastDecoderLayer):
    """Must equal `GraniteMoeDecoderLayer.forward`, whose `residual_multiplier` its __init__ sets."""

    block_name = "block_sparse_moe"


class FastNemotronHBlock(Fast):
    """Must equal `NemotronHBlock.forward` of Transformers: one norm, one mixer, one residual connection."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm = self.norm
        # Transformers' code converts hidden_states to the weight's dtype
        if args or not is_unmodified(norm, kind=FastRMSNorm) or norm.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states, *args, **kwargs)
        normed, residual = norm.add_norm(hidden_states)
        if self.block_type == "linear_attention":
            for name in ("position_ids", "use_cache"):
                kwargs.pop(name, None)
            return residual + self.mixer(normed, pop_cache(kwargs), **kwargs)
        if self.block_type == "full_attention":
            return residual + self.mixer(hidden_states=normed, **kwargs)[0]
        return add_block(self.mixer, normed, residual)


class FastNemotronHMoEBlock(FastSharedMoEBlock):
    """Must equal `NemotronHMoE.forward`. If its experts have a smaller, latent width (Nemotron 3 Super and Ultra), the
    GEMM that projects back from that width also adds the residual."""

    @graph_break(stock_block)
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        if residual is None or self.config.moe_latent_size is None:
            return super().forward(hidden_states, residual, scale)
        shared_TH = self.shared_experts(hidden_states).flatten(0, -2)
        total_TH = add_scaled(residual.flatten(0, -2), shared_TH, scale)
        x_TH = hidden_states.flatten(0, -2)
        _, weight_TK, ids_TK = self.gate(x_TH)
        y_TL = self.experts(self.fc1_latent_proj(x_TH), ids_TK, weight_TK)
        proj = self.fc2_latent_proj
        plain = type(proj) is nn.Linear and proj.bias is None and is_unmodified(proj)
        if plain and total_TH.dtype == y_TL.dtype == proj.weight.dtype:
            out_TH = total_TH.addmm_(y_TL, proj.weight.t(), alpha=scale)  # in place: total_TH has no other reference
        else:
            out_TH = add_scaled(total_TH, proj(y_TL), scale)
        return torch.ops.aten._unsafe_view(out_TH, residual.shape)  # FSDP warns about views


def add_block(block: nn.Module, normed: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return residual + scale · block(normed). The experts' last kernel does the add if the block supports it."""
    if isinstance(block, FastMoEBlock) and is_unmodified(block):
        return block(normed, residual, scale)
    return add_scaled(residual, block(normed), scale)
