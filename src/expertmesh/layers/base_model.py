"""The twin of a family's base model (`model.model`). Every way to call a model passes through it.

The causal-LM class is only one of its callers: TRL's trainers, PEFT's wrappers, reward models and hand-written heads
call the base model itself. So what a forward needs is set up here: documents and padding (rows.py), and the record of
the call (records.py).
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
    "mtp_loss_weight is set, but the model was called without labels: a loss made elsewhere (by TRL's trainers, label "
    "smoothing, a head of your own) leaves multi-token prediction untrained. Call the model with labels, take "
    "expertmesh.SFTTrainer, or leave mtp_loss_weight out."
)


class FastBaseModel(Fast):
    """Must equal the forward of its HF class for each document by itself. Hidden states of padding are zero.

    In training a cache of padded rows, and of several documents, is filled only if the caller asks for it.
    """

    _mtp_loss_weight: float | None = None  # as `FusedModel.mtp_loss_weight`
    _announced = False
    _waiting: dict[str, Any] | None = None  # experts' weights, until those that share a parameter with them are loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cls: Any = type(self)
        if self._waiting:
            raise ValueError(
                f"Only some experts of a layer were loaded: {min(self._waiting)} has come, others of its layer have "
                f"not. Take a complete checkpoint of this model."
            )
        if is_traced():
            with nullcontext() if torch.compiler.is_dynamo_compiling() else as_stock(self):
                return cls.__stock__.forward(self, *args, **kwargs)
        refuse_undivided(self)
        fuse_adapted_experts(self._experts_at)
        fuse_adapted_linears(self._linears_at)
        inputs, call = dict(zip(self._names, args, strict=False)) | kwargs, call_of(self)
        if self.training and torch.is_grad_enabled():
            if self._mtp_loss_weight is not None and not call.predicts:
                raise ValueError(_NO_MTP)
            if not self._announced:
                self._announced = True
                log_trainable_parameters(call.model)
        with in_call(call):
            apart = self._prepare(inputs, call)
            outputs = super().forward(**inputs)
        return outputs if apart is None else apart.together(outputs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """By this nn.DataParallel copies modules."""
        gpus = max(2, torch.cuda.device_count())
        raise ValueError(
            f"{type(self).__name__} would be copied to {gpus} GPUs in every forward, as one process sees them all and "
            f"Trainer then wraps models in nn.DataParallel. expertmesh runs one process per GPU. Start them with "
            f"torchrun --nproc-per-node {gpus} script.py, or let one process see one GPU: CUDA_VISIBLE_DEVICES=0 "
            f"python script.py."
        )

    def _prepare(self, inputs: dict[str, Any], call: Call) -> Unpadded | None:
        """Put into `inputs` what the layers must know of the rows; returns how rows were taken apart, if they were."""
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or any(inputs.get(name) is not None for name in CACHES):
            return None
        training = self.training and torch.is_grad_enabled()
        without = call.defers or (self._mamba2 and (training or call.targets is not None))
        if without and inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # the default is meant for generation: it costs copies, and Mamba2's kernels
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        mask: Any = inputs.get("attention_mask")
        positions: Any = inputs.get("position_ids")
        numbers: Any = inputs.get("seq_idx")
        if _has_axes(positions):
            positions, numbers = (positions[0], numbers) if len(positions) == 4 else (None, _number(positions, mask))
        if not all(x is None or is_of_rows(x, shape) for x in (positions, numbers)):
            return None
        told, longest = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
        documents, apart = None, None
        # as our Trainer marks it the mask beside them is for the auxiliary loss alone
        if told is not None and longest is not None and (mask is None or inputs.pop("bucketed", False)):
            documents = Documents(told.int(), int(longest))
        elif told is not None and numbers is None:
            numbers = document_numbers(told, *shape)
        marked = positions is not None or numbers is not None
        if mask is not None and not is_of_rows(mask, shape):  # of the user's own, which only attention goes by
            stateful = self._mamba2 or self._stateful is not None
            if stateful and marked and inspect_rows(shape, None, positions, numbers).count > shape[0]:
                self._refuse_leaks(inputs)
            return None
        if documents is None and (mask is not None or marked):
            found = inspect_rows(shape, mask, positions, numbers, call.targets)
            call.labelled = found.labelled
            if not found.keep.all():
                if not self._takes_apart(inputs, found, call):
                    return None
                inputs["use_cache"] = False
                apart = Unpadded.of(found.keep, device)
                inputs["position_ids"] = found.positions(device) if positions is None else positions.expand(shape)
                inputs.update({name: apart.take(x) for name, x in inputs.items()})
                shape = (1, len(apart.index))
            if apart is not None or found.count > shape[0]:
                documents = found.documents(device)
        inputs["attention_mask"] = None
        inputs.pop("seq_idx", None)
        if documents is not None and len(documents.cu_seqlens) - 1 > shape[0]:
            self._refuse_leaks(inputs)
        self._say(inputs, documents, shape, device)
        return apart

    def takes_documents(self, length: int) -> bool:
        """Whether documents in rows of this length are kept apart without a mask and without a look at them."""
        return self._stateful is None and self._attends_by(length) != "masks"

    def _attends_by(self, length: int) -> str:
        """How attention learns of documents: by the keyword "documents", by those of "flash" attention, by "masks"."""
        if is_flash_attention_requested(self.config):
            return "flash"
        chosen = self.config._attn_implementation
        own = chosen == SINKS or (chosen == NAME and not _has_windows(self.config, length))
        return "documents" if own and self._makes_masks else "masks"

    def _takes_apart(self, inputs: dict[str, Any], found: RowInfo, call: Call) -> bool:
        """Whether padding can be left out. Where it cannot, rows stay as Transformers has them."""
        length, config, caching = found.keep.shape[1], self.config, inputs.get("use_cache")
        if caching is None:
            for_a_loss = (self.training and torch.is_grad_enabled()) or (self._sinks and call.targets is not None)
            caching = getattr(config, "use_cache", False) and not for_a_loss
        of_images = _has_axes(inputs.get("position_ids")) or config.get_text_config() is not config
        whole = call.predicts or of_images or caching or inputs.get("output_attentions") or found.labelled_padding
        noisy = self.training and getattr(config, "router_jitter_noise", 0)  # drawn for each token, padding or not
        windows_shift = _has_windows(config, length) and found.has_holes
        if found.count and not (whole or noisy or windows_shift) and self.takes_documents(length):
            return True
        if found.count > int(found.keep.any(1).sum()):
            raise ValueError(
                f"Rows hold several documents (position_ids begin anew) and padding as well, which "
                f"{type(self).__name__} cannot keep apart here. Leave attention_mask out: padding at the end of a row "
                f"may be a document of its own."
            )
        return False

    def _refuse_leaks(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError if documents in a row would see each other."""
        who: str | None = None
        if inputs.get("attention_mask") is not None:
            who = "Mamba2" if self._stateful is None else self._stateful.__name__
            why, instead = "a mask of your own speaks to attention alone", "leave attention_mask out"
        elif self._mamba2 and inputs.get("use_cache"):
            who, why, instead = "Mamba2", "a cache keeps one state for a row", "set use_cache=False"
        elif self._stateful is not None and not self._stateful_told:
            who, why = self._stateful.__name__, "its state passes from one token to the next"
            instead = "train a model whose mixers can be told"
        elif self._sinks and self.config._attn_implementation == "eager":
            who, why = "attention", "the masks of attn_implementation='eager' do not know documents"
            instead = "leave attn_implementation and the fusion sink_attention as they are by default"
        if who is not None:
            raise ValueError(
                f"Several documents lie in a row, and {who} of {type(self).__name__} would let one see another: {why}. "
                f"Give each document a row of its own (packing=False, padding_free=False), or {instead}."
            )
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # nobody goes on from a cache of several documents

    def _say(self, inputs: dict[str, Any], documents: Documents | None, shape: tuple[int, int], device: Any) -> None:
        """Tell the layers of the documents, each in the way it understands."""
        way = self._attends_by(shape[1])
        if way == "documents":
            inputs["attention_mask"] = causal_placeholder(documents, device)
        if documents is None:
            return
        number_BS = document_numbers(documents.cu_seqlens, *shape)
        positions = inputs.get("position_ids")
        if positions is None or (_has_axes(positions) and len(positions) == 3):
            counted = torch.arange(shape[1], device=device) - document_starts(number_BS)
            inputs["position_ids"] = (
                counted if positions is None else torch.cat([counted.expand(positions[:1].shape), positions])
            )
        if way == "documents":
            inputs["documents"] = documents
        if way == "flash" or self._stateful is not None:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.cu_seqlens)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), documents.max_length)
        if self._stateful is not None:
            inputs["seq_idx"] = number_BS.int()
        if self._mamba2:
            inputs["document_starts"] = document_starts(number_BS)


@contextmanager
def as_stock(base: Any) -> Iterator[None]:
    """Within: the base model and all that is in it run Transformers' code, which PyTorch can export and transform."""
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
    """Make the base model of a fused model its twin, once all modules in it are what they will be."""
    base = model.base_model
    if base is not model:
        stock: Any = type(base)
        base.__class__ = twin(stock, FastBaseModel)
    cls: Any = type(base).__stock__
    base._names = list(inspect.signature(cls.forward).parameters)[1:]
    # whether by the functions that pass on what has four dimensions
    base._makes_masks = "create_causal_mask" in inspect.getsource(cls)
    # mixers with a state from token to token: whether some are ours; the class of others, and whether these pass
    # documents on to their kernels, which refuse what they cannot do
    mixers: set[Any] = {type(module) for module in base.modules() if keeps_state(module)}
    base._mamba2 = any(issubclass(mixer, FastMamba2Mixer) for mixer in mixers)
    base._stateful = next((mixer for mixer in mixers if not issubclass(mixer, FastMamba2Mixer)), None)
    base._stateful_told = base._stateful is not None and "cu_seq_lens_q" in inspect.getsource(base._stateful)
    # where adapters will stand
    base._experts_at, base._linears_at = (
        find_modules(model, is_experts),
        find_modules(model, lambda m: type(m) is nn.Linear),
    )
    base._sinks = any(hasattr(module, "sinks") for module in base.modules())


def keeps_state(module: nn.Module) -> bool:
    """Whether it is a mixer with a state: Mamba, a gated delta net, a short convolution, linear attention."""
    name = type(module).__name__
    has_conv = any(isinstance(child, nn.Conv1d) for child in module.children())
    return has_conv or re.search(r"(Lightning|Linear)Attention|DeltaNet|DeltaAttention|Mamba\w*Mixer", name) is not None


def is_of_rows(x: Any, shape: tuple[int, int]) -> bool:
    """Whether it says something of each token, [B, S] or [1, S]."""
    return isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[1] == shape[1] and x.shape[0] in (1, shape[0])


def _has_axes(positions: Any) -> bool:
    """Whether positions are [3, B, S]: time, height and width, as images have; or [4, B, S], behind those of text."""
    return isinstance(positions, torch.Tensor) and positions.ndim == 3


def _number(axes_ABS: torch.Tensor, mask: Any) -> torch.Tensor:
    """Numbers of documents [B, S]: one begins where all axes are at zero, or all fall; within an image some do."""
    begins = (axes_ABS == 0).all(0)
    begins[:, 1:] |= (axes_ABS.diff() < 0).all(0)
    return (begins if mask is None or mask.shape != begins.shape else begins & (mask != 0)).cumsum(-1)


def _has_windows(config: Any, length: int) -> bool:
    """Whether some layer sees less than a row of this length."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and not any(kind.startswith(("sliding", "chunked", "compressed", "heavily", "indexed")) for kind in kinds):
        return False
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return any(size is not None and size < length for size in sizes)
