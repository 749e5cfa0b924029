"""Multi-token prediction (MTP): modules behind the model that learn to predict the tokens after the next one.

DeepSeek-V3 (arXiv:2412.19437, section 2.2). The module of depth k joins what depth k-1 knows of token t with the
embedding of token t+k, runs a decoder layer, and predicts token t+k+1 with the main model's head:

    h'_t = eh_proj([enorm(emb(token_{t+k})); hnorm(h^{k-1}_t)])    h^0: the main model's last hidden state
    h^k  = norm(layer(h'))
    loss = main loss + mtp_loss_weight * mean over k of CE(head(h^k_t), token_{t+k+1})

A module is made of the family's own decoder layers (`MTPBlock`), so that its attention and experts are fused and
sharded like all others. In training `predicting()` overhears what the main model computes anyway (embeddings, hidden
states, masks), and `with_predictions` adds the losses; in evaluation and generation nothing of this runs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from expertmesh import backends
from expertmesh.layers.head import DeferredLogits, causal_lm_loss, deferred_logits
from expertmesh.records import Forward
from expertmesh.twins import Fast, cache_of, twin


class MTPBlock(Fast):
    """Twin of a decoder layer that may begin a module (joins its two inputs) and may end it (last norm).

    Without either it is its HF class.
    """

    begins = False
    end_norm: str | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, S, H]; if it begins a module also, by position, the embeddings [B, S, H] to join."""
        if self.begins:
            embeds, *args = args  # type: ignore[assignment]
            joined = torch.cat([self.enorm(embeds), self.hnorm(hidden_states)], dim=-1)
            hidden_states = self.eh_proj(joined)
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states if self.end_norm is None else self.get_submodule(self.end_norm)(hidden_states)


def begin_module(block: Any, norm: Callable[[], nn.Module], hidden_size: int) -> None:
    """Let this decoder layer join hidden states and embeddings, by weights of the names that checkpoints give them."""
    _become_block(block)
    block.enorm, block.hnorm = norm(), norm()
    block.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
    block.begins = True


def end_module(block: Any, norm: nn.Module, name: str) -> None:
    """Let this decoder layer end with a norm, under the `name` ("a" or "a.b") that checkpoints give it."""
    _become_block(block)
    *holders, last = name.split(".")
    parent = block
    for holder in holders:
        parent.add_module(holder, nn.Module())
        parent = parent.get_submodule(holder)
    parent.add_module(last, norm)
    block.end_norm = name


def _become_block(block: nn.Module) -> None:
    cls: Any = type(block)
    if not issubclass(cls, MTPBlock):
        block.__class__ = twin(cls, MTPBlock)


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

    def remove_from(self, model: nn.Module) -> list[nn.Module]:
        """Take the modules out of the model; returns them and all that is in them."""
        removed: list[nn.Module] = []
        for place in self.places:
            parent, _, name = place.rpartition(".")
            removed += model.get_submodule(place).modules()
            delattr(model.get_submodule(parent), name)
        return removed


def were_saved(model: Any, missing: set[str], unexpected: set[str], source: Any, quantized: bool = False) -> bool:
    """Whether the checkpoint that a model was just loaded from has weights for its MTP modules.

    missing, unexpected: the model's and the checkpoint's keys without counterpart. Of the weights that checkpoints
    repeat, those that this one has are noted. Raises ValueError if there is a part of a module only. But to a model
    that stays quantized a checkpoint whose MTP modules are less quantized has none: such a model cannot be trained.
    """
    mtp: MTP = model._mtp
    names = {name for name in model.state_dict() if mtp.owns(name)}
    lost = sorted(names & missing)
    if quantized and 0 < len(lost) < len(names):
        backends.logger().warning(
            f"The modules for multi-token prediction are left out: {source!r} holds them less quantized than the model."
        )
    elif 0 < len(lost) < len(names):
        raise ValueError(
            f"The checkpoint {source!r} has only a part of the weights for multi-token prediction: "
            f"{', '.join(lost[:3])} {'is' if len(lost) == 1 else 'are'} missing. Download or convert it again, or load "
            f"it with num_nextn_predict_layers=0, which leaves these modules out."
        )
    mtp.copies = {copy: name for copy, name in mtp.copies.items() if copy in unexpected}
    return not lost


def promise_what_is_kept(model: Any) -> None:
    """Let the configuration of a model without MTP modules say so, before it is saved: else servers look for them."""
    config = model.config.get_text_config()
    if getattr(model, "_mtp", None) is None:
        for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
            if getattr(config, name, None):
                setattr(config, name, 0)


class _Overheard:
    """What the main model computes in one forward, by forward hooks."""

    def __init__(self, model: Any):
        self.model = model
        self.embeds: Any = None  # [B, S, H]
        self.hidden: Any = None  # [B, S, H], after the last norm
        self.position_ids: Any = None  # the caller's, or None
        self.inputs: dict[nn.Module, dict[str, Any]] = {}  # keyword arguments of decoder layers

    def hooks(self) -> Iterator[Any]:
        base = self.model.base_model
        yield base.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self.model.get_input_embeddings().register_forward_hook(self._embedded)
        yield base.register_forward_hook(self._end)
        for layer in {like for depth in self.model._mtp.depths for _, like in depth}:
            yield layer.register_forward_pre_hook(self._layer, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.embeds, self.position_ids = kwargs.get("inputs_embeds"), kwargs.get("position_ids")

    def _embedded(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.embeds = output

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hidden = output[0]

    def _layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache_of(kwargs := dict(kwargs))
        self.inputs[module] = kwargs | {"use_cache": False}


@contextlib.contextmanager
def predicting(model: Any, forward: Forward, on: bool) -> Iterator[None]:
    """While `on`, and if the model trains MTP modules, their losses are part of its loss in this forward."""
    with contextlib.ExitStack() as hooks:
        if on and model._mtp is not None and model.mtp_loss_weight is not None:
            forward.predictions = _Overheard(model)
            for handle in forward.predictions.hooks():
                hooks.callback(handle.remove)
        yield


def with_predictions(forward: Forward, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The loss function `loss`, and in a forward that is `predicting()` the MTP losses on top of it."""
    return loss if forward.predictions is None else functools.partial(_loss, forward.predictions, loss)


def _loss(
    overheard: _Overheard, main: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    model = overheard.model
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = _ahead(labels, 1, -100)
    hidden, total = overheard.hidden, 0.0
    for depth, blocks in enumerate(model._mtp.depths, 1):
        inputs: tuple[torch.Tensor, ...] = (hidden, F.pad(overheard.embeds, (0, 0, 0, depth))[..., depth:, :])
        for block, like in blocks:
            inputs = (block(*inputs, **overheard.inputs[like]),)
        (hidden,) = inputs
        total += _cross_entropy(
            _logits(model, logits, hidden), _targets(targets, overheard.position_ids, depth), vocab_size, kwargs
        )
    scale = model.mtp_loss_weight / len(model._mtp.depths)
    return main(logits, labels, vocab_size, **kwargs) + scale * total


def _ahead(x_BS: torch.Tensor, distance: int, fill: int) -> torch.Tensor:
    """What stands `distance` positions later in each row; `fill` where the row has ended."""
    return F.pad(x_BS, (0, distance), value=fill)[..., distance:].contiguous()


def _targets(targets: torch.Tensor, position_ids: torch.Tensor | None, depth: int) -> torch.Tensor:
    """Labels [B, S] of this depth from those of the next token; -100 where they lie in another packed document."""
    targets = _ahead(targets, depth, -100)
    if position_ids is None:
        return targets
    same = _ahead(position_ids, depth + 1, -1) == position_ids + depth + 1
    return targets.masked_fill(~same.to(targets.device), -100)


def _logits(model: Any, main: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The head's logits of `hidden`; deferred, by the same weights, where the main model's are."""
    if isinstance(main, DeferredLogits):
        return deferred_logits(hidden, main.weight, main.bias)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        # FSDP gathers the head together with the last norm, and counts one call of both
        raise ValueError(
            "mtp_loss_weight on a sharded model needs the head that defers its logits: leave the fusion "
            "linear_cross_entropy on, and the head without adapters."
        )
    return model.get_output_embeddings()(hidden)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, kwargs: dict[str, Any]) -> Any:
    """Divided like the main loss; 0, not nan, where a batch has no label this far ahead."""
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None:
        num_items = (targets != -100).sum().clamp(min=1)
    return causal_lm_loss(logits, targets, vocab_size, num_items_in_batch=num_items, shift_labels=targets)
