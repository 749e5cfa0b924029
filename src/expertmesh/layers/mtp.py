"""Multi-token prediction (MTP): modules after the last layer that learn to predict the tokens after the next one.

From DeepSeek-V3 (arXiv:2412.19437, section 2.2). The module of depth k joins the hidden state of token t at depth k-1
with the embedding of token t+k, runs a decoder layer, and predicts token t+k+1 with the main model's head:

    h'_t = eh_proj([enorm(emb(token_{t+k})); hnorm(h^{k-1}_t)])    h^0: the main model's last hidden state
    h^k  = norm(layer(h'))
    loss = main loss + mtp_loss_weight * mean over k of CE(head(h^k_t), token_{t+k+1})

A module consists of the family's decoder layers, fused and sharded like all others. In training `record_inputs` records
intermediate results of the main model, and `loss_with_predictions` adds the losses. Otherwise the modules do not run.

DeepSeek-V3,  `model.layers.N`, after the N layers of the main model: one decoder layer per depth, with enorm, hnorm,
GLM-4.5       eh_proj, shared_head.norm, and copies of the embedding and the head
Nemotron 3    `mtp.layers`: per depth, one layer for each of `mtp_layers_block_type`; the first has enorm, hnorm and
              eh_proj, the last final_layernorm
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
    """Twin of a decoder layer in a module. The first one joins the module's inputs, the last one applies `end_norm`."""

    begins = False
    end_norm: str | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, S, H]. The first layer also takes the embeddings [B, S, H], as a positional argument."""
        if self.begins:
            embeds, *args = args  # type: ignore[assignment]
            hidden_states = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden_states)], dim=-1))
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states if self.end_norm is None else self.get_submodule(self.end_norm)(hidden_states)


def _make_module(blocks: list[Any], norm: Any, end: str) -> None:
    """Make an MTP module of these decoder layers. All its norms are copies of `norm`, which must be newly initialized.
    end: the name of the last norm in checkpoints, "a" or "a.b"."""
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

    depths: for each depth, pairs of a decoder layer and the main model's layer whose inputs (masks, positions) it gets.
    places: names of the modules that contain the layers. copies: {name on disk: name in the model} of weights shared
    with the main model, which checkpoints contain twice.
    """

    depths: list[list[tuple[nn.Module, nn.Module]]]
    places: list[str]
    copies: dict[str, str] = field(default_factory=dict)

    def owns(self, name: str) -> bool:
        """Whether the weight of this name belongs to an MTP module."""
        return name.startswith(tuple(f"{place}." for place in self.places))

    def parameters_of(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Return the modules' parameters, without shared ones."""
        return (parameter for name, parameter in model.named_parameters() if self.owns(name))


def add_modules(model: Any) -> MTP | None:
    """Add the MTP modules of its configuration to a newly created model. Return None if there are none."""
    make = _MAKERS.get(model.config.model_type)
    if make is None or not model.config.num_nextn_predict_layers or model.get_output_embeddings() is None:
        return None
    mtp = make(model)
    model._keys_to_ignore_on_load_unexpected |= {re.escape(copy) for copy in mtp.copies}
    model.init_weights()  # only the new ones: Transformers marks weights that it has initialized
    return mtp


def _deepseek_v3(model: Any) -> MTP:
    config, layers = model.config, model.model.layers
    template, mtp = layers[-1], MTP([], [])

    for _ in range(config.num_nextn_predict_layers):
        place = f"model.layers.{len(layers)}"
        block = type(template)(config, len(layers))
        block.shared_head = nn.Module()
        _make_module([block], template.input_layernorm, "shared_head.norm")
        layers.append(block)
        mtp.depths.append([(block, template)])
        mtp.places.append(place)
        mtp.copies[f"{place}.embed_tokens.weight"] = "model.embed_tokens.weight"
        mtp.copies[f"{place}.shared_head.head.weight"] = "lm_head.weight"
    return mtp


def _nemotron_h(model: Any) -> MTP:
    config, layers, kinds = model.config, model.model.layers, model.config.mtp_layers_block_type
    missing = sorted(set(kinds) - set(config.layers_block_type))
    if missing:
        raise ValueError(
            f"mtp_layers_block_type has {', '.join(missing)}, which the main model's layers_block_type lacks. "
            f"Load with num_nextn_predict_layers=0 to leave the MTP modules out."
        )
    model.mtp = nn.Module()
    model.mtp.layers = nn.ModuleList()
    mtp = MTP([], ["mtp"])

    for _ in range(config.num_nextn_predict_layers):
        templates = [layers[config.layers_block_type.index(kind)] for kind in kinds]
        blocks = [type(template)(config, template.layer_idx) for template in templates]
        _make_module(blocks, layers[0].norm, "final_layernorm")
        model.mtp.layers.extend(blocks)
        mtp.depths.append(list(zip(blocks, templates, strict=True)))
    for kind in ("tp", "ep", "fsdp"):  # shard them like the main model's layers
        plan = getattr(config, f"base_model_{kind}_plan") or {}
        getattr(model, f"_{kind}_plan").update({f"mtp.{k}": v for k, v in plan.items() if k.startswith("layers.")})
    return mtp


_MAKERS = {"deepseek_v3": _deepseek_v3, "glm4_moe": _deepseek_v3, "nemotron_h": _nemotron_h}


def drop_missing_modules(model: Any, loaded: Any, source: Any, quantized: bool = False) -> None:
    """Drop the MTP modules if the checkpoint lacks them, and entries of `copies` that it lacks.

    loaded: Transformers' record of missing and unexpected keys. Raises ValueError if the checkpoint has only some of
    the modules' weights, unless the model stays `quantized` and so cannot be trained. In that case they are dropped.
    """
    mtp: MTP = model._mtp
    names = {name for name in model.state_dict() if mtp.owns(name)}
    missing = sorted(names & loaded.missing_keys)
    if 0 < len(missing) < len(names):
        if not quantized:
            raise ValueError(
                f"The checkpoint {source!r} has only a part of the weights for multi-token prediction: "
                f"{', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} missing. Download or convert it "
                f"again, or leave these modules out with num_nextn_predict_layers=0."
            )
        backends.logger().warning(
            f"Modules for multi-token prediction are left out: they are not quantized like the rest of {source!r}."
        )
    mtp.copies = {on_disk: name for on_disk, name in mtp.copies.items() if on_disk in loaded.unexpected_keys}
    if missing:
        loaded.missing_keys -= names
        for place in mtp.places:
            parent, _, name = place.rpartition(".")
            delattr(model.get_submodule(parent), name)
        model._mtp = None


def config_without_mtp(model: Any) -> None:
    """Set the number of MTP modules in the configuration to 0 if the model has none. Otherwise servers expect them."""
    config = model.config.get_text_config()
    if getattr(model, "_mtp", None) is None:
        for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
            if getattr(config, name, None):
                setattr(config, name, 0)


@contextlib.contextmanager
def record_inputs(call: Call) -> Iterator[None]:
    """Context manager whose forward hooks record in `call` the inputs that MTP modules get from the main model."""

    def record_embeddings(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call.embeds = output

    def record_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.layer_inputs[module] = {key: kwargs[key] for key in kwargs.keys() - {*CACHES}} | {"use_cache": False}

    def record_output(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call.hidden, call.position_ids = output[0], kwargs.get("position_ids")
        if kwargs.get("inputs_embeds") is not None:
            call.embeds = kwargs["inputs_embeds"]

    base, templates = call.model.base_model, {template for depth in call.model._mtp.depths for _, template in depth}
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(call.model.get_input_embeddings().register_forward_hook(record_embeddings))
        hooks.enter_context(base.register_forward_hook(record_output, with_kwargs=True))
        for template in templates:
            hooks.enter_context(template.register_forward_pre_hook(record_layer, with_kwargs=True))
        yield


def loss_with_predictions(
    call: Call, main: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """Return the loss of the loss function `main` plus the weighted mean of the MTP losses. Each of these is divided
    like the main loss, but is 0, not nan, if the batch has no label for its depth."""
    model, hidden, next_labels, num_items = call.model, call.hidden, call.targets, kwargs.get("num_items_in_batch")
    assert next_labels is not None, "the model was called with labels"
    if not isinstance(logits, DeferredLogits) and any(isinstance(weight, DTensor) for weight in model.parameters()):
        # FSDP all-gathers the head in one unit with the last norm, and expects one forward of that unit
        raise ValueError(
            "mtp_loss_weight on a sharded model needs deferred logits: leave the fusion linear_cross_entropy on, and "
            "put no adapters on the head."
        )
    losses = []
    for depth, blocks in enumerate(model._mtp.depths, 1):
        inputs: tuple[torch.Tensor, ...] = (hidden, F.pad(call.embeds, (0, 0, 0, depth))[..., depth:, :])
        for block, template in blocks:
            inputs = (block(*inputs, **call.layer_inputs[template]),)
        (hidden,) = inputs
        targets = next_tokens(next_labels, distance=depth).contiguous()
        if call.position_ids is not None:  # drop labels of the next packed document
            same = next_tokens(call.position_ids, -1, depth + 1) == call.position_ids + depth + 1
            targets = targets.masked_fill(~same.to(targets.device), -100)
        count = (targets != -100).sum().clamp(min=1) if num_items is None else num_items
        if isinstance(logits, DeferredLogits):
            at_depth: Any = deferred_logits(hidden, logits.weight, logits.bias)
        else:
            at_depth = model.get_output_embeddings()(hidden)
        losses.append(causal_lm_loss(at_depth, targets, vocab_size, num_items_in_batch=count, shift_labels=targets))
    scale = model.mtp_loss_weight / len(losses)
    return main(logits, labels, vocab_size, **kwargs) + scale * sum(losses)
