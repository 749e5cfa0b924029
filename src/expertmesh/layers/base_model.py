"""Fast twin of a family's base model (`model.model`), which every forward of a model calls.

TRL's trainers, PEFT's wrappers, reward models and custom heads call the base model without the causal-LM class. So this
module sets up each forward: it handles documents and padding (rows.py) and sets the current `Call` (records.py).
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from expertmesh.kernels.documents import Documents, document_numbers, document_starts
from expertmesh.layers.attention import NAME, SINKS, causal_placeholder
from expertmesh.layers.lora import fuse_adapted_linears
from expertmesh.layers.mamba2 import FastMamba2Mixer
from expertmesh.layers.rows import RowInfo, Unpadded, inspect_rows
from expertmesh.moe.experts import NAME as EXPERTS
from expertmesh.moe.experts import is_experts
from expertmesh.moe.lora import find_modules, fuse_adapted_experts, log_trainable_parameters
from expertmesh.parallel.layout import refuse_undivided
from expertmesh.records import Call, call_of, in_call
from expertmesh.twins import CACHES, Fast, is_traced, twin

_NO_MTP = (
    "mtp_loss_weight is set, but the model was called without labels. A loss computed outside of the model (by TRL's "
    "trainers, label smoothing, a custom head) does not train multi-token prediction. Call the model with labels, use "
    "expertmesh.SFTTrainer, or leave mtp_loss_weight out."
)


class FastBaseModel(Fast):
    """Must equal the forward of its Transformers class run on each document alone. Hidden states of padding are zero.
    In training, padded rows and rows of several documents fill a cache only if the caller passes use_cache=True."""

    _mtp_loss_weight: float | None = None  # see `FusedModel.mtp_loss_weight`
    _logged = False  # whether the trainable parameters were logged
    _waiting: dict[str, Any] | None = None  # loaded experts' weights whose stacked parameter is still incomplete

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cls: Any = type(self)
        if self._waiting:
            raise ValueError(
                f"Only some experts of a layer were loaded: {min(self._waiting)} was, but others of its layer not. "
                f"Load a complete checkpoint of this model."
            )
        if is_traced():
            with nullcontext() if torch.compiler.is_dynamo_compiling() else as_stock(self):
                return cls.__stock__.forward(self, *args, **kwargs)
        refuse_undivided(self)
        fuse_adapted_experts(self._expert_places)
        fuse_adapted_linears(self._linear_places)
        inputs, call = dict(zip(self._argument_names, args, strict=False)) | kwargs, call_of(self)
        if self.training and torch.is_grad_enabled():
            if self._mtp_loss_weight is not None and not call.predicts:
                raise ValueError(_NO_MTP)
            if not self._logged:
                self._logged = True
                log_trainable_parameters(call.model)
        with in_call(call):
            unpadded = self._prepare(inputs, call)
            outputs = super().forward(**inputs)
        return outputs if unpadded is None else unpadded.restore(outputs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raise ValueError, because nn.DataParallel, which calls this, is not supported."""
        gpus = max(2, torch.cuda.device_count())
        raise ValueError(
            f"{type(self).__name__} would be copied to {gpus} GPUs in every forward: Trainer wraps models in "
            f"nn.DataParallel if a process sees several GPUs. expertmesh runs one process per GPU. Start it with "
            f"torchrun --nproc-per-node {gpus} script.py, or on one GPU with CUDA_VISIBLE_DEVICES=0 python script.py."
        )

    def _prepare(self, inputs: dict[str, Any], call: Call) -> Unpadded | None:
        """Edit `inputs` for packed documents and padding. Return the `Unpadded` if padding was removed, else None."""
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or any(inputs.get(name) is not None for name in CACHES):
            return None
        training = self.training and torch.is_grad_enabled()
        cacheless = call.defers or (self._mamba2 and (training or call.targets is not None))
        if cacheless and inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # a cache costs copies, and Mamba2's kernels do not run with one
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        mask: Any = inputs.get("attention_mask")
        positions: Any = inputs.get("position_ids")
        numbers: Any = inputs.get("seq_idx")
        if _has_axes(positions):
            positions, numbers = (
                (positions[0], numbers) if len(positions) == 4 else (None, _doc_numbers(positions, mask))
            )
        if not all(x is None or is_of_rows(x, shape) for x in (positions, numbers)):
            return None
        cu_seqlens, longest = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
        documents, unpadded = None, None
        # with "bucketed", which our Trainer sets, the mask is for the auxiliary loss only
        if cu_seqlens is not None and longest is not None and (mask is None or inputs.pop("bucketed", False)):
            documents = Documents(cu_seqlens.int(), int(longest))
        elif cu_seqlens is not None and numbers is None:
            numbers = document_numbers(cu_seqlens, *shape)
        marked = positions is not None or numbers is not None
        if mask is not None and not is_of_rows(mask, shape):  # a user-defined mask, which only attention reads
            stateful = self._mamba2 or self._stateful is not None
            if stateful and marked and inspect_rows(shape, None, positions, numbers).count > shape[0]:
                self._refuse_leaks(inputs)
            return None
        if documents is None and (mask is not None or marked):
            info = inspect_rows(shape, mask, positions, numbers, call.targets)
            call.labelled = info.labelled
            if not info.keep.all():
                if not self._can_unpad(inputs, info, call):
                    return None
                inputs["use_cache"] = False
                unpadded = Unpadded.of(info.keep, device)
                inputs["position_ids"] = info.positions(device) if positions is None else positions.expand(shape)
                inputs.update({name: unpadded.take(x) for name, x in inputs.items()})
                shape = (1, len(unpadded.index))
            if unpadded is not None or info.count > shape[0]:
                documents = info.documents(device)
        inputs["attention_mask"] = None
        inputs.pop("seq_idx", None)
        if documents is not None and len(documents.cu_seqlens) - 1 > shape[0]:
            self._refuse_leaks(inputs)
        self._pass_documents(inputs, documents, shape, device)
        return unpadded

    def takes_documents(self, length: int) -> bool:
        """Whether documents in rows of this length are separated without a mask and without a device sync."""
        return self._stateful is None and self._document_form(length) != "masks"

    def _document_form(self, length: int) -> str:
        """How attention gets documents: "documents" (our keyword), "flash" (Transformers' keywords) or "masks"."""
        if is_flash_attention_requested(self.config):
            return "flash"
        chosen = self.config._attn_implementation
        ours = chosen == SINKS or (chosen == NAME and not _has_windows(self.config, length))
        return "documents" if ours and self._makes_masks else "masks"

    def _can_unpad(self, inputs: dict[str, Any], info: RowInfo, call: Call) -> bool:
        """Whether padding can be removed. Raises ValueError if it cannot but rows also hold several documents."""
        length, config, caching = info.keep.shape[1], self.config, inputs.get("use_cache")
        if caching is None:
            for_a_loss = (self.training and torch.is_grad_enabled()) or (self._sinks and call.targets is not None)
            caching = getattr(config, "use_cache", False) and not for_a_loss
        of_images = _has_axes(inputs.get("position_ids")) or config.get_text_config() is not config
        needs_rows = call.predicts or of_images or caching or inputs.get("output_attentions") or info.labelled_padding
        noisy = self.training and getattr(config, "router_jitter_noise", 0)  # drawn for each token, padding included
        windows_shift = _has_windows(config, length) and info.has_holes
        if info.count and not (needs_rows or noisy or windows_shift) and self.takes_documents(length):
            return True
        if info.count > int(info.keep.any(1).sum()):
            raise ValueError(
                f"Rows hold several documents (position_ids restart) and padding, which {type(self).__name__} cannot "
                f"separate with these inputs. Leave attention_mask out: padding at the end of a row may be a document."
            )
        return False

    def _refuse_leaks(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError if a layer would let documents of a row influence each other."""
        layer: str | None = None
        if inputs.get("attention_mask") is not None:
            layer = "Mamba2" if self._stateful is None else self._stateful.__name__
            why, instead = "only attention reads a custom attention_mask", "leave attention_mask out"
        elif self._mamba2 and inputs.get("use_cache"):
            layer, why, instead = "Mamba2", "a cache holds one state per row", "set use_cache=False"
        elif self._stateful is not None and not self._stateful_takes_documents:
            layer, why = self._stateful.__name__, "its state passes from one token to the next"
            instead = "train a model whose mixers accept document boundaries"
        elif self._sinks and self.config._attn_implementation == "eager":
            layer, why = "attention", "the masks of attn_implementation='eager' do not separate documents"
            instead = "leave attn_implementation and the fusion sink_attention at their defaults"
        if layer is not None:
            raise ValueError(
                f"A row holds several documents, and {layer} of {type(self).__name__} would mix them: {why}. "
                f"Put one document in each row (packing=False, padding_free=False), or {instead}."
            )
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # generation cannot continue from a cache of several documents

    def _pass_documents(
        self, inputs: dict[str, Any], documents: Documents | None, shape: tuple[int, int], device: Any
    ) -> None:
        """Put the documents into `inputs`, in the form that each kind of layer accepts."""
        form = self._document_form(shape[1])
        if form == "documents":
            inputs["attention_mask"] = causal_placeholder(documents, device)
        if documents is None:
            return
        number_BS = document_numbers(documents.cu_seqlens, *shape)
        positions = inputs.get("position_ids")
        if positions is None or (_has_axes(positions) and len(positions) == 3):
            text = torch.arange(shape[1], device=device) - document_starts(number_BS)  # positions within documents
            inputs["position_ids"] = (
                text if positions is None else torch.cat([text.expand(positions[:1].shape), positions])
            )
        if form == "documents":
            inputs["documents"] = documents
        if form == "flash" or self._stateful is not None:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.cu_seqlens)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), documents.max_length)
        if self._stateful is not None:
            inputs["seq_idx"] = number_BS.int()
        if self._mamba2:
            inputs["document_starts"] = document_starts(number_BS)


@contextmanager
def as_stock(base: Any) -> Iterator[None]:
    """Context manager in which the base model runs Transformers' code, which PyTorch can export and transform."""
    config: Any = base.config
    ours = {"_experts_implementation": {EXPERTS: "grouped_mm"}, "_attn_implementation": {NAME: "sdpa", SINKS: "eager"}}
    stock = [(module, "__class__", type(module).__stock__) for module in base.modules() if isinstance(module, Fast)]
    stock += [(config, name, theirs.get(getattr(config, name), getattr(config, name))) for name, theirs in ours.items()]
    with ExitStack() as undo:
        for owner, name, value in stock:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def fuse_base(model: Any) -> None:
    """Make the base model of a fused model an instance of its twin. Call it after all other modules are fused."""
    base = model.base_model
    if base is not model:
        stock: Any = type(base)
        base.__class__ = twin(stock, FastBaseModel)
    cls: Any = type(base).__stock__
    base._argument_names = list(inspect.signature(cls.forward).parameters)[1:]
    # `create_causal_mask` passes 4-d masks on unchanged, the placeholder among them
    base._makes_masks = "create_causal_mask" in inspect.getsource(cls)
    # mixers with a recurrent state: _mamba2 for our twins, _stateful for the class of another kind. A class that passes
    # cu_seq_lens_q to its kernels separates documents, or its kernels raise.
    mixers: set[Any] = {type(module) for module in base.modules() if keeps_state(module)}
    base._mamba2 = any(issubclass(mixer, FastMamba2Mixer) for mixer in mixers)
    base._stateful = next((mixer for mixer in mixers if not issubclass(mixer, FastMamba2Mixer)), None)
    base._stateful_takes_documents = base._stateful is not None and "cu_seq_lens_q" in inspect.getsource(base._stateful)
    # modules that PEFT may wrap later
    base._expert_places, base._linear_places = (
        find_modules(model, is_experts),
        find_modules(model, lambda m: type(m) is nn.Linear),
    )
    base._sinks = any(hasattr(module, "sinks") for module in base.modules())


def keeps_state(module: nn.Module) -> bool:
    """Whether the module mixes tokens with a state: Mamba, gated delta net, short convolution, linear attention."""
    name = type(module).__name__
    has_conv = any(isinstance(child, nn.Conv1d) for child in module.children())
    return has_conv or re.search(r"(Lightning|Linear)Attention|DeltaNet|DeltaAttention|Mamba\w*Mixer", name) is not None


def is_of_rows(x: Any, shape: tuple[int, int]) -> bool:
    """Whether x is a tensor with a value for each token, [B, S] or [1, S]."""
    return isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[1] == shape[1] and x.shape[0] in (1, shape[0])


def _has_axes(positions: Any) -> bool:
    """Whether positions are multimodal: [3, B, S] (time, height, width), or [4, B, S] with text positions in front."""
    return isinstance(positions, torch.Tensor) and positions.ndim == 3


def _doc_numbers(axes_ABS: torch.Tensor, mask: Any) -> torch.Tensor:
    """Return document numbers [B, S]. A document begins where all axes are 0 or all fall; in images only some do."""
    begins = (axes_ABS == 0).all(0)
    begins[:, 1:] |= (axes_ABS.diff() < 0).all(0)
    return (begins if mask is None or mask.shape != begins.shape else begins & (mask != 0)).cumsum(-1)


def _has_windows(config: Any, length: int) -> bool:
    """Whether the attention of some layer has a window shorter than a row of this length."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and not any(kind.startswith(("sliding", "chunked", "compressed", "heavily", "indexed")) for kind in kinds):
        return False
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return any(size is not None and size < length for size in sizes)
