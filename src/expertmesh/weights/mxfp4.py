"""GPT-OSS written in MXFP4, as OpenAI publishes it: experts in 4-bit floats, 32 of them times one power of two.

`save_pretrained` writes what is in memory, always: Transformers ignores there what it does not know, so an option of
ours would be lost on a stock model without a word. Names and layout here are those of openai/gpt-oss-20b;
`quantized.MXFP4` reads them.
"""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from expertmesh import backends
from expertmesh.parallel import ranks
from expertmesh.weights.quantized import forget_packed_names, unpacked
from expertmesh.weights.write import save_sharded

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
# between 0, 0.5, 1, 1.5, 2, 3, 4 and 6; a tie goes to the even code: all that is not below 0.75 becomes 1
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_MIDDLES[1::2] = torch.nextafter(_MIDDLES[1::2], torch.zeros(()))


def save_mxfp4(model: PreTrainedModel, folder: str | Path, max_shard_size: int | str = "5GB") -> dict[str, float]:
    """Write a GPT-OSS checkpoint with packed experts, and say so. Returns the relative error of each packed tensor.

    That is |packed - weights| / |weights| (Frobenius). Every rank must call it, under any layout: one tensor at a time
    is gathered, and packed by the rank that writes it, expert by expert. All else keeps its dtype; the model stays as
    it is. Raises ValueError, before anything is written, for a model whose experts cannot be packed.
    """
    names = _packable(model)
    forget_packed_names(model)
    errors: dict[str, torch.Tensor] = {}

    def pack(name: str, key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in names:
            return {key: weight}
        blocks, scales, errors[key] = _packed_experts(weight)
        return {f"{key}_blocks": blocks, f"{key}_scales": scales}

    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
    try:
        save_sharded(model, folder, max_shard_size, pack)
    finally:
        del model.config.quantization_config
    everyone = ranks.gathered({key: error.item() for key, error in errors.items()})
    measured = {key: error for part in everyone for key, error in part.items()}
    worst = max(measured, key=measured.__getitem__)
    backends.logger().info(
        f"expertmesh: {folder} holds the weights of experts in MXFP4, all else in "
        f"{str(model.dtype).removeprefix('torch.')}, and a quantization_config. The largest relative error of a packed "
        f"tensor, |packed - weights| / |weights|, is {measured[worst]:.4f}: {worst}."
    )
    return measured


def packed(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite float32 weights [.., 32] as bytes [.., 16] and exponents [..] of MXFP4, which `unpacked` reads.

    The scale is 2**(floor(log2(amax)) - 2), with amax first rounded to the two bits that a 4-bit float has. The OCP MX
    specification does not round it, and makes 6 of 7.9 instead of 8: the error of random weights is larger then. What
    was MXFP4 before comes out exact.
    """
    amax = groups.abs().amax(-1)
    scales = ((amax.view(torch.int32) + (1 << 21) >> 23) - 2).clamp(0, 252)  # a float's exponent, too, is plus 127
    scaled = groups * (254 - scales << 23).view(torch.float32)[..., None]  # by a power of two, made without rounding
    codes = torch.bucketize(scaled.abs(), _MIDDLES.to(groups.device), out_int32=True)
    codes += scaled.view(torch.int32) >> 28 & 8  # the sign, in the highest of 4 bits
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), scales.to(torch.uint8)


def _packed_experts(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: N803
    """Blocks [E, O, I / 32, 16], scales [E, O, I / 32] and their relative error."""
    parts, norms = [], torch.zeros(2, dtype=torch.float64, device=weight_EIO.device)
    for weight in weight_EIO.split(len(weight_EIO) if weight_EIO.is_meta else 1):
        groups = weight.mT.contiguous().float().unflatten(-1, (-1, 32))
        parts.append(packed(groups))
        pair = unpacked(*parts[-1]) - groups, groups
        norms += torch.stack([values.norm(dim=-1).double().norm() for values in pair]).square()
    blocks, scales = map(torch.cat, zip(*parts, strict=True))
    return blocks, scales, (norms[0] / norms[1].clamp(min=1e-300)).sqrt()


def _packable(model: PreTrainedModel) -> set[str]:
    """The names of the weights to be packed. Raises ValueError, on every rank, if they cannot be."""
    if not isinstance(model, PreTrainedModel) or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("Only a Transformers model without adapters can be packed: unwrap it and merge them first.")
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, GptOssExperts))
    weights = {name: w for name, w in model.named_parameters() if name.startswith(experts) and w.ndim == 3}
    if not weights or any(w.shape[1] % 32 for w in weights.values()) or hasattr(model.config, "quantization_config"):
        raise ValueError(
            f"MXFP4 checkpoints are of GPT-OSS, with widths that are multiples of 32, from weights that are not "
            f"quantized; this {type(model).__name__} is none: use save_pretrained."
        )
    local = {name: w.to_local() if isinstance(w, DTensor) else w for name, w in weights.items()}
    broken = [name for part in ranks.gathered([n for n, w in local.items() if not w.isfinite().all()]) for name in part]
    if broken:
        raise ValueError(f"{broken[0]} has weights that are infinite or NaN, which MXFP4 does not know.")
    return set(weights)
