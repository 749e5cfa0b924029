"""Multi-token prediction (MTP): modules behind the model that learn to predict the tokens after the next one.

DeepSeek-V3 (arXiv:2412.19437, section 2.2). The module of depth k joins what depth k-1 knows of token t with the
embedding of token t+k, runs a decoder layer, and predicts token t+k+1 with the main model's head:

    h'_t = eh_proj([enorm(emb(token_{t+k})); hnorm(h^{k-1}_t)])    h^0: the main model's last hidden state
    h^k  = norm(layer(h'))
    loss = main loss + mtp_loss_weight * mean over k of CE(head(h^k_t), token_{t+k+1})

A module is made of the family's own decoder layers, fused and sharded like all others. In training `record_inputs`
keeps what the main model computes anyway, and `loss_with_predictions` adds the losses; else nothing of this runs.

DeepSeek-V3,  `model.layers.N` behind the N layers of the main model: one decoder layer for each depth, with enorm,
GLM-4.5       hnorm, eh_proj, shared_head.norm, and copies of the embedding and the head
Nemotron 3    `mtp.layers`: for each depth a layer for each of `mtp_layers_block_type`; enorm, hnorm and eh_proj in the
              first of them, final_layernorm in the last
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from expertmesh import backends
from expertmesh.layers.head import DeferredLogits, causal_lm_loss, deferred_logits, next_tokens
from expertmesh.records import Call
from expertmesh.twins import CACHES, Fast, twin


class MTPBlock(Fast):
    """Twin of a decoder layer that may begin a module (joins its two inputs) and may end it (last norm)."""

    begins = False
    end_norm: str | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, S, H]; if it begins a module also, by position, the embeddings [B, S, H] to join."""
        if self.begins:
            embeds, *args = args  # type: ignore[assignment]
            hidden_states = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden_states)], dim=-1))
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states if self.end_norm is None else self.get_submodule(self.end_norm)(hidden_states)


def _make_module(blocks: list[Any], norm: Any, end: str) -> None:
    """Make an MTP module of these decoder layers. The first joins hidden states and embeddings; behind the last comes a
    norm named `end` ("a" or "a.b"), as in checkpoints. All norms are copies of `norm`, which is as it was made."""
    first, last = blocks[0], blocks[-1]
    for block in {first, last}:
        stock: Any = type(block)
        block.__class__ = twin(stock, MTPBlock)
    first.enorm, first.hnorm, last_norm = (copy.deepcopy(norm) for _ in range(3))
    first.eh_proj = nn.Linear(2 * len(norm.weight), len(norm.weight), bias=False)
    first.begins, last.end_norm = True, end
    holder, _, name = end.rpartition(".")
    setattr(last.get_submodule(holder), name, last_norm)


@dataclass
class MTP:
    """A model's MTP modules.

    depths: for each depth its decoder layers, each with the main model's layer that has the same inputs (masks,
    positions). places: the names of the modules that hold all of them. copies: {name on disk: name in the model} of
    weights that checkpoints repeat in the module, though it shares them with the main model.
    """

    depths: list[list[tuple[nn.Module, nn.Module]]]
    places: list[str]
    copies: dict[str, str] = field(default_factory=dict)

    def owns(self, name: str) -> bool:
        """Whether this is the name of a weight of an MTP module."""
        return name.startswith(tuple(f"{place}." for place in self.places))

    def parameters_of(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The modules' own parameters."""
        return (parameter for name, parameter in model.named_parameters() if self.owns(name))


def add_modules(model: Any) -> MTP | None:
    """Give a model that was just made the MTP modules of its configuration; None if that has none."""
    make = _MAKERS.get(model.config.model_type)
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
        _make_module([block], like.input_layernorm, "shared_head.norm")
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
        _make_module(blocks, layers[0].norm, "final_layernorm")
        model.mtp.layers.extend(blocks)
        mtp.depths.append(list(zip(blocks, likes, strict=True)))
    for kind in ("tp", "ep", "fsdp"):  # sharded as the main model's layers are
        plan = getattr(config, f"base_model_{kind}_plan") or {}
        getattr(model, f"_{kind}_plan").update({f"mtp.{k}": v for k, v in plan.items() if k.startswith("layers.")})
    return mtp


_MAKERS = {"deepseek_v3": _deepseek_v3, "glm4_moe": _deepseek_v3, "nemotron_h": _nemotron_h}


def drop_missing_modules(model: Any, loaded: Any, source: Any, quantized: bool = False) -> None:
    """Keep the MTP modules, and those of their `copies`, that the checkpoint has; drop the modules if it has none.

    loaded: Transformers' record of the keys that only one of both has. Raises ValueError for a part of the modules; of
    a model that stays `quantized`, and so is not trained, they are dropped.
    """
    mtp: MTP = model._mtp
    names = {name for name in model.state_dict() if mtp.owns(name)}
    lost = sorted(names & loaded.missing_keys)
    if 0 < len(lost) < len(names):
        if not quantized:
            raise ValueError(
                f"The checkpoint {source!r} has only a part of the weights for multi-token prediction: "
                f"{', '.join(lost[:3])} {'is' if len(lost) == 1 else 'are'} missing. Download or convert it again, or "
                f"load it with num_nextn_predict_layers=0, which leaves these modules out."
            )
        backends.logger().warning(
            f"The modules for multi-token prediction are left out: {source!r} holds them less quantized than the model."
        )
    mtp.copies = {on_disk: name for on_disk, name in mtp.copies.items() if on_disk in loaded.unexpected_keys}
    if lost:
        loaded.missing_keys -= names
        for place in mtp.places:
            parent, _, name = place.rpartition(".")
            delattr(model.get_submodule(parent), name)
        model._mtp = None


def config_without_mtp(model: Any) -> None:
    """Let the configuration of a model without MTP modules say so, before it is saved: else servers look for them."""
    config = model.config.get_text_config()
    if getattr(model, "_mtp", None) is None:
        for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
            if getattr(config, name, None):
                setattr(config, name, 0)


@contextlib.contextmanager
def record_inputs(call: Call) -> Iterator[None]:
    """Within: forward hooks record in a call that `predicts` what the MTP modules take from the main model."""

    def embedded(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call.embeds = output

    def layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.layer_inputs[module] = {key: kwargs[key] for key in kwargs.keys() - {*CACHES}} | {"use_cache": False}

    def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call.hidden, call.position_ids = output[0], kwargs.get("position_ids")
        if kwargs.get("inputs_embeds") is not None:
            call.embeds = kwargs["inputs_embeds"]

    base, likes = call.model.base_model, {like for depth in call.model._mtp.depths for _, like in depth}
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(call.model.get_input_embeddings().register_forward_hook(embedded))
        hooks.enter_context(base.register_forward_hook(end, with_kwargs=True))
        for like in likes:
            hooks.enter_context(like.register_forward_pre_hook(layer, with_kwargs=True))
        yield


def loss_with_predictions(
    call: Call, main: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """The model's loss function `main`, and the MTP losses on top of it: each divided like the main loss; 0, not nan,
    where a batch has no label that far ahead."""
    model, hidden, next_labels, num_items = call.model, call.hidden, call.targets, kwargs.get("num_items_in_batch")
    assert next_labels is not None, "the model was called with labels"
    if not isinstance(logits, DeferredLogits) and any(isinstance(weight, DTensor) for weight in model.parameters()):
        # FSDP gathers the head together with the last norm, and counts one call of both
        raise ValueError(
            "mtp_loss_weight on a sharded model needs the head that defers its logits: leave the fusion "
            "linear_cross_entropy on, and the head without adapters."
        )
    losses = []
    for depth, blocks in enumerate(model._mtp.depths, 1):
        inputs: tuple[torch.Tensor, ...] = (hidden, F.pad(call.embeds, (0, 0, 0, depth))[..., depth:, :])
        for block, like in blocks:
            inputs = (block(*inputs, **call.layer_inputs[like]),)
        (hidden,) = inputs
        targets = next_tokens(next_labels, distance=depth).contiguous()
        if call.position_ids is not None:  # no label of another packed document
            same = next_tokens(call.position_ids, -1, depth + 1) == call.position_ids + depth + 1
            targets = targets.masked_fill(~same.to(targets.device), -100)
        count = (targets != -100).sum().clamp(min=1) if num_items is None else num_items
        if isinstance(logits, DeferredLogits):
            ahead: Any = deferred_logits(hidden, logits.weight, logits.bias)
        else:
            ahead = model.get_output_embeddings()(hidden)
        losses.append(causal_lm_loss(ahead, targets, vocab_size, num_items_in_batch=count, shift_labels=targets))
    scale = model.mtp_loss_weight / len(losses)
    return main(logits, labels, vocab_size, **kwargs) + scale * sum(losses)
