"""Where the families keep their multi-token prediction modules, and what those are made of.

DeepSeek-V3,  `model.layers.N` behind the N layers of the main model: one decoder layer for each depth, with enorm,
GLM-4.5       hnorm, eh_proj, shared_head.norm, and copies of the embedding and the head
Nemotron 3    `mtp.layers`: for each depth a layer for each of `mtp_layers_block_type`; enorm, hnorm and eh_proj in the
              first of them, final_layernorm in the last
"""

import re
from typing import Any

from torch import nn

from expertmesh.layers.mtp import MTP, make_module


def add_modules(model: Any) -> MTP | None:
    """Give a model that was just made the MTP modules of its configuration; None if that has none."""
    make = MAKERS.get(model.config.model_type)
    if make is None or not model.config.num_nextn_predict_layers or model.get_output_embeddings() is None:
        return None
    mtp = make(model)
    model._keys_to_ignore_on_load_unexpected |= {re.escape(copy) for copy in mtp.copies}
    model.init_weights()  # the new ones: all others are marked as done
    return mtp


def _deepseek_v3(model: Any) -> MTP:
    config, layers = model.config, model.model.layers
    like, mtp = layers[-1], MTP([], [])

    for _ in range(config.num_nextn_predict_layers):
        place = f"model.layers.{len(layers)}"
        block = type(like)(config, len(layers))
        block.shared_head = nn.Module()
        make_module([block], like.input_layernorm, "shared_head.norm")
        layers.append(block)
        mtp.depths.append([(block, like)])
        mtp.places.append(place)
        mtp.copies[f"{place}.embed_tokens.weight"] = "model.embed_tokens.weight"
        mtp.copies[f"{place}.shared_head.head.weight"] = "lm_head.weight"
    return mtp


def _nemotron_h(model: Any) -> MTP:
    config, layers, kinds = model.config, model.model.layers, model.config.mtp_layers_block_type
    missing = sorted(set(kinds) - set(config.layers_block_type))
    if missing:
        raise ValueError(
            f"mtp_layers_block_type has {', '.join(missing)}, which is not among the main model's layers_block_type. "
            f"Load with num_nextn_predict_layers=0 to leave the MTP modules out."
        )
    model.mtp = nn.Module()
    model.mtp.layers = nn.ModuleList()
    mtp = MTP([], ["mtp"])

    for _ in range(config.num_nextn_predict_layers):
        likes = [layers[config.layers_block_type.index(kind)] for kind in kinds]
        blocks = [type(like)(config, like.layer_idx) for like in likes]
        make_module(blocks, layers[0].norm, "final_layernorm")
        model.mtp.layers.extend(blocks)
        mtp.depths.append(list(zip(blocks, likes, strict=True)))
    for kind in ("tp", "ep", "fsdp"):  # sharded as the main model's layers are
        plan = getattr(config, f"base_model_{kind}_plan") or {}
        getattr(model, f"_{kind}_plan").update({f"mtp.{k}": v for k, v in plan.items() if k.startswith("layers.")})
    return mtp


MAKERS = {"deepseek_v3": _deepseek_v3, "glm4_moe": _deepseek_v3, "nemotron_h": _nemotron_h}
