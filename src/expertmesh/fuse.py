"""fuse(model) converts a Hugging Face model in place: the same object with faster classes.

Nothing is renamed, wrapped or copied. Modules whose code is recognized become instances of a faster subclass
(families/). Experts run on the "expertmesh" backend of Transformers' registry. The model itself becomes an instance of
a subclass of its class (`FusedModel`). Loading, saving, generation, PEFT and Trainer work as before.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from expertmesh import backends
from expertmesh.families.recompute import set_levels, without_policy
from expertmesh.families.report import FUSIONS, Fusion, apply_fusions, count_of, fuse_head, print_report, switched_on
from expertmesh.layers import attention
from expertmesh.layers.base_model import FastBaseModel, fuse_base
from expertmesh.layers.head import FastHead, causal_lm_loss, next_tokens
from expertmesh.layers.mtp import (
    MTP,
    add_modules,
    config_without_mtp,
    drop_missing_modules,
    loss_with_predictions,
    record_inputs,
)
from expertmesh.moe import experts as fast_experts
from expertmesh.moe.block import aux_loss_share
from expertmesh.moe.lora import patch_peft_experts
from expertmesh.parallel import ranks
from expertmesh.parallel.layout import expert_parallel_fsdp
from expertmesh.parallel.peft import patch_peft_layouts
from expertmesh.parallel.ranks import check_same_on_all_ranks
from expertmesh.parallel.setup import refuse_unfit_shards
from expertmesh.records import Call, call_of, in_call
from expertmesh.twins import twin
from expertmesh.weights.files import atomic_export
from expertmesh.weights.four_bit import ExpertsQuantizer
from expertmesh.weights.quantized import ReadsQuantized, forget_packed_names, tell_saved
from expertmesh.weights.read import glance, to_model_names
from expertmesh.weights.write import is_sharded, save_sharded, with_copies


@dataclass(frozen=True)
class Loading:
    """Options for models that are created inside of `loading`.

    mtp: whether to add modules for multi-token prediction if the configuration (and the checkpoint, if any) has them.
    complete: whether to raise ValueError if a checkpoint lacks weights.
    """

    fusions: frozenset[str] = frozenset(FUSIONS)
    mtp: bool = False
    complete: bool = False


_loading: ContextVar[Loading] = ContextVar("loading", default=Loading())  # noqa: B039  frozen
_stock_loss: Any = PreTrainedModel.loss_function.fget  # type: ignore[attr-defined]  # torch.compile rejects super()
_NO_EXPERTS = (
    "the model has no experts that use Transformers' ExpertsInterface and stays stock; "
    "TrainingArguments(use_liger_kernel=True) enables Liger's kernels in Transformers' trainers"
)
_NO_MTP = "A single graph cannot hold the loss of multi-token prediction: leave fullgraph=True or mtp_loss_weight out."


def fuse(model: Any, fused: bool | dict[str, bool] = True) -> Any:
    """Convert a Hugging Face model to its fast twin in place and return it. Parameters, buffers, names and hooks stay.

    fused: True for all fusions, or a dict that switches single ones off, such as {"router": False}. A model without
    experts stays stock, which is logged. Raises ValueError for an unknown fusion, TypeError for other kinds of models.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"fuse() takes a Transformers model, not {type(model).__name__}. If the model is wrapped (by PEFT, DDP or "
            f"torch.compile), fuse the model inside before wrapping it."
        )
    if fused is False:
        return model
    instance: Any = model
    stock: Any = type(model)
    with loading(fused):
        if has_fast_experts(stock) and not isinstance(model, FusedModel):
            memo: dict[int, Any] = {}
            for module in model.modules():
                if isinstance(getattr(module, "config", None), PreTrainedConfig):
                    module.config = copy.deepcopy(module.config, memo)  # the original stays valid for stock models
            if _wants("experts"):
                instance.set_experts_implementation(fast_experts.NAME)
            chosen = model.config._attn_implementation
            if chosen == "eager" and _has_our_sinks(model):  # Transformers' default for GPT-OSS
                instance.set_attn_implementation(attention.SINKS)
            elif chosen == "sdpa" and _is_causal_text(model):
                instance.set_attn_implementation(attention.NAME)
            forget_packed_names(model)
            instance.__class__ = twin(stock, FusedBaseModel if model.base_model is model else FusedModel)
            instance._fuse_modules()
    ours = isinstance(model, FusedModel)
    print_report(model, instance.fusion_report() if ours else [Fusion("experts", reason=_NO_EXPERTS)])
    return model


@contextmanager
def loading(fused: bool | dict[str, bool], mtp: bool = False, complete: bool = False) -> Iterator[None]:
    """Context manager in which new models get these options: `fused` as in `fuse`, the others as in `Loading`."""
    token = _loading.set(Loading(switched_on(fused), mtp, complete))
    try:
        yield
    finally:
        _loading.reset(token)


def _wants(fusion: str) -> bool:
    return fusion in _loading.get().fusions


def _has_our_sinks(model: PreTrainedModel) -> bool:
    return _wants("sink_attention") and model.config.model_type == "gpt_oss"


def _is_causal_text(model: PreTrainedModel) -> bool:
    """Whether the model is text-only, its attention is causal, and Transformers makes its masks."""
    config = model.config
    return getattr(config, "is_causal", True) and config.get_text_config() is config and model._supports_flash_attn


def has_fast_experts(cls: Any) -> bool:
    """Whether the experts of this model class use Transformers' `use_experts_implementation`."""
    return issubclass(cls, PreTrainedModel) and bool(cls._can_set_experts_implementation())


def fused_class(stock: Any) -> Any:
    """Return the subclass of a Transformers model class whose __init__ fuses, or the class itself without experts. Name
    and module stay the same, because Transformers selects weight conversion and loss by them."""
    return twin(stock, FusedModel) if has_fast_experts(stock) else stock


class FusedModel(ReadsQuantized):
    """Mixin that a fused model adds to its Transformers class."""

    _mtp: MTP | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("__fast__") is FusedModel:  # a twin, created by fusing or by unpickling
            cls.forward = _forward_of(cls.__stock__)  # type: ignore[method-assign]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._frozen = [name for name, weight in self.named_parameters() if not weight.requires_grad]
        if _loading.get().mtp:
            self._mtp = add_modules(self)
        self._fuse_modules()

    @property
    def mtp_loss_weight(self) -> float | None:
        """The weight of the MTP loss in training; None if MTP is not trained."""
        return self.base_model._mtp_loss_weight

    @mtp_loss_weight.setter
    def mtp_loss_weight(self, value: float | None) -> None:
        if value is not None and self._mtp is None:
            raise ValueError(f"{type(self).__name__} has no modules for multi-token prediction.")
        self.base_model._mtp_loss_weight = value  # every forward calls the base model

    def fusion_report(self) -> list[Fusion]:
        """Return for each fusion whether it is on, which libraries run it, or why it is off."""
        return [replace(row, count=count_of(row.name, self)) if row.on else row for row in self._fusions]

    def _fuse_modules(self) -> None:
        backends.warn_if_untested()
        self._fusions = apply_fusions(self, _loading.get().fusions)
        fuse_base(self)
        for module in self.modules():
            # a stock model with this configuration calls our experts and attention, too, but lacks this attribute
            module.in_fused_model = True  # type: ignore[assignment]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return Transformers' choice, with our implementation as the default."""
        if requested_experts is None and _wants("experts"):
            requested_experts = fast_experts.NAME
        return super().get_correct_experts_implementation(requested_experts)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return Transformers' choice, but ours instead of "sdpa" and as the default for attention with sinks."""
        if requested_attention is None and _has_our_sinks(self):
            requested_attention = attention.SINKS
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return attention.NAME if chosen == "sdpa" and _is_causal_text(self) else chosen

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in PyTorch. Also patches PEFT, which calls this before it adds adapters."""
        patch_peft_experts()
        patch_peft_layouts()
        return super().named_modules(*args, **kwargs)

    @property
    def loss_function(self) -> Any:
        """Transformers' loss function, plus MTP losses if the call trains MTP. Causal losses accept deferred logits."""
        loss, call = _stock_loss(self), call_of(self)
        if loss is ForCausalLMLoss:
            loss = functools.partial(causal_lm_loss, labelled=call.labelled, counts=call.counts)
        return functools.partial(loss_with_predictions, call, loss) if call.predicts else loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch, but also converts weights named as in checkpoints, which Trainer passes to resume.

        Raises ValueError if weights of some experts of a layer are missing. With strict=False later calls may supply
        them before the next forward.
        """
        copies = self._mtp.copies if self._mtp is not None else {}
        new = {key: value for key, value in state_dict.items() if key not in copies} if copies else state_dict
        base = self.base_model
        state, base._waiting = to_model_names(self, {**base._waiting, **new} if base._waiting else new, strict)
        return super().load_state_dict(state, strict, assign)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers. All ranks must call it.

        Each rank writes its part of a sharded model, without gathering, except with adapters, a `state_dict` or an
        upload to the Hub. The export includes SHA256SUMS. It replaces an older one only when all files are written.
        """
        defaults = {"push_to_hub": False, "save_original_format": True, "distributed_checkpoint": False}
        changed = {key for key, value in kwargs.items() if value is not defaults.get(key)}
        special, adapted = args or changed - {"max_shard_size", "is_main_process"}, self._hf_peft_config_loaded
        if special or adapted or not is_sharded(self):
            if len(args) < 2 and not adapted:
                kwargs["state_dict"] = with_copies(self, kwargs.get("state_dict"))
            config_without_mtp(self)
            writes = ranks.rank() == 0 and (args[0] if args else kwargs.get("is_main_process", True))
            if not writes or kwargs.get("distributed_checkpoint"):
                super().save_pretrained(save_directory, *args, **kwargs)
            else:
                kwargs |= {"repo_id": Path(save_directory).name} | kwargs if kwargs.get("push_to_hub") else {}
                with atomic_export(save_directory, ranks.ALONE) as staging:
                    super().save_pretrained(staging, *args, **kwargs)
        else:
            save_sharded(self, save_directory, kwargs.get("max_shard_size", "5GB"))
        tell_saved(self, save_directory)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in Transformers, whose `resize_token_embeddings` calls this, but fuses the new head if the old one was."""
        fast = isinstance(self.get_output_embeddings(), FastHead)
        super().set_output_embeddings(new_embeddings)
        if fast:
            fuse_head(self)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As in Transformers, but first raises on all ranks if the ranks disagree or a shard would be empty.
        Transformers' code then raises on some ranks only, and the others deadlock."""
        if mesh_manager is not None:
            values = model.config.to_dict()
            check_same_on_all_ranks("the model's configuration", {key: values[key] for key in values if key[0] != "_"})
            refuse_unfit_shards(model, distributed_config)
        with expert_parallel_fsdp(model, distributed_config):
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but raises if ranks would read their shards from different checkpoints."""
        if model.is_distributed_loading_by_transformers:
            check_same_on_all_ranks(
                "the checkpoint", {Path(file).name: glance(file) for file in checkpoint_files or ()}
            )
        return ReadsQuantized._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """As in Transformers, which initializes missing weights randomly, but raises for them if `complete`."""
        complete, source = _loading.get().complete, load_config.pretrained_model_name_or_path
        # quantizers other than ours create tensors that are not in the checkpoint
        other_quantizer = load_config.is_quantized and not isinstance(load_config.hf_quantizer, ExpertsQuantizer)
        if model._mtp is not None:
            drop_missing_modules(model, loading_info, source, other_quantizer)
        if complete:  # report experts and routers before Transformers raises for shapes
            experts = [name for name, module in model.named_modules() if fast_experts.is_experts(module)]
            blocks = tuple(f"{name.rpartition('.')[0]}." for name in experts)
            broken = {*loading_info.missing_and_mismatched(), *loading_info.conversion_errors}
            _refuse_missing({key for key in broken if key.startswith(blocks)}, source)
        for name in model._frozen:  # Transformers' loading resets requires_grad unless it shards
            model.get_parameter(name).requires_grad_(False)
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if complete and not other_quantizer:  # missing_keys no longer contains tied weights
            _refuse_missing(loading_info.missing_keys, source)
        return loading_info

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """As in Transformers, but `offload` copies on a side stream (memory/offload.py)."""
        options = activation_checkpointing_kwargs or {}
        if offload and every_n_layers == 1 and "recompute" not in options:
            options, offload = options | {"recompute": "offload"}, False
        super().activation_checkpointing_enable(options or None, every_n_layers, offload)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any):
        """As in Transformers, but the recompute reuses the experts that the forward selected. {"recompute": policy}
        recomputes parts of layers (`levels_of`). Raises ValueError for a policy that does not fit the model."""
        policy, func = without_policy(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, func, **kwargs)
        if policy is not None and enable:
            set_levels(self, policy, func, **kwargs)


def _forward_of(stock: Any) -> Any:
    @functools.wraps(stock.forward)  # Trainer and generate read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if backends.in_fullgraph():
            if self.mtp_loss_weight is not None and self.training:
                torch._dynamo.graph_break(msg=_NO_MTP)
            with aux_loss_share(self, kwargs):
                return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()  # dynamo cannot trace the context variables below
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        defer = self.training and labels is not None
        targets = shifted if shifted is not None or labels is None else next_tokens(labels)
        predicts = defer and self.mtp_loss_weight is not None
        call = Call(self, targets, defer, kwargs.pop("count_predictions", False), predicts)
        recording = record_inputs(call) if predicts else nullcontext()
        with aux_loss_share(self, kwargs), recording, in_call(call):
            return stock.forward(self, *args, **kwargs)

    return forward


class FusedBaseModel(FastBaseModel, FusedModel):
    """A base model that was fused without a causal-LM model around it."""


def _refuse_missing(weights: set[str], source: Any) -> None:
    if weights:
        missing, more = sorted(weights), f" and {len(weights) - 3} more" if len(weights) > 3 else ""
        raise ValueError(
            f"The checkpoint {source!r} lacks weights, or some have the wrong shape: {', '.join(missing[:3])}{more}. "
            f"Training would start them from random values. Download or convert the checkpoint again; its index "
            f"(model.safetensors.index.json) must list every weight of every layer."
        )
