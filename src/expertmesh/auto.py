"""AutoModelForCausalLM: the one import line.

A subclass of Transformers' class of the same name. Its mapping from configuration to model class gives the fused twin
of every class whose experts are pluggable; everything else about loading is Transformers' own code, so every argument
of `from_pretrained` and `from_config` means what it means there.
"""

import copy
import math
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from expertmesh.fuse import fuse, fused_class, loading
from expertmesh.parallel.setup import AUTO, DistributedSetup, create_distributed_setup_from_config
from expertmesh.weights.files import verify_sums
from expertmesh.weights.four_bit import ExpertsQuantConfig, pack
from expertmesh.weights.init import initialise_shards

_STOCK: Any = transformers.AutoModelForCausalLM._model_mapping


class _FusedMapping(type(_STOCK)):  # type: ignore[misc]
    """Transformers' mapping {configuration class: model class}, with fused classes where experts are pluggable."""

    def __init__(self) -> None:
        self.__dict__.update(vars(_STOCK))  # what is registered there counts here

    def __getitem__(self, config_class: type) -> Any:
        found = super().__getitem__(config_class)
        return tuple(map(fused_class, found)) if isinstance(found, tuple) else fused_class(found)


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """Transformers' `AutoModelForCausalLM`, whose Mixture-of-Experts models train several times faster.

    All arguments are Transformers'. Three are added. `fused=True`; False returns the stock model, and a dict switches
    single fusions, as {"router": False} (an unknown one is an error that names all). `distributed_setup=None`: a
    `DistributedSetup`, or its section as a dict, lays the model out over the ranks; each holds and loads only its part.
    `mtp_loss_weight=None`: a positive number trains the modules for multi-token prediction of DeepSeek V3, GLM-4.5 and
    Nemotron 3, with this weight of their loss; None keeps those that a checkpoint has as they are. Either way they are
    saved again. `num_nextn_predict_layers=0` leaves them out.
    """

    _model_mapping: Any = _FusedMapping()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As Transformers', plus `fused`, `distributed_setup` and `mtp_loss_weight`.

        Raises ValueError if weights of a folder differ from its SHA256SUMS (every file is read once for that); if
        weights are missing on disk, which Transformers would start at random, unless the caller asks for
        `output_loading_info`; if the setup does not fit the model or the number of ranks; and if there is nothing that
        `mtp_loss_weight` could weigh.
        """
        fused, setup, mtp_weight = _take_ours(kwargs)
        loader: Any = super() if fused is not False else transformers.AutoModelForCausalLM
        if setup is not None:
            kwargs["distributed_config"] = _join(setup, fused)
        verify_sums(pretrained_model_name_or_path, together=setup is not None)
        if fused is not False and isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = _own_copy(kwargs["config"], kwargs)
        caller_looks = kwargs.get("output_loading_info", False)  # and sees for himself what is missing
        with loading(fused, mtp=True, complete=not caller_looks):
            loaded = loader.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
            model = _finish(model, fused, setup, mtp_weight)
            return (model, *info) if info else model

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """As Transformers', plus `fused`, `distributed_setup` and `mtp_loss_weight`.

        With a setup, no rank ever holds more than its part and one whole layer, and the weights depend on rank 0's
        torch seed alone, whatever the layout (without a setup the same seed draws in another order). Only with
        `mtp_loss_weight` are its modules made. `quantization_config=`: an `ExpertsQuantConfig`, drawn as with a setup.
        """
        fused, setup, mtp_weight = _take_ours(kwargs)
        quantization = kwargs.pop("quantization_config", None)
        maker: Any = super() if fused is not False else transformers.AutoModelForCausalLM
        if quantization is not None and not isinstance(quantization, ExpertsQuantConfig):
            raise ValueError("from_config takes an ExpertsQuantConfig as quantization_config, and no other.")
        if fused is not False or setup is not None:  # a layout is noted there, too
            config = _own_copy(config, kwargs)
        with loading(fused, mtp=mtp_weight is not None):
            if setup is None and quantization is None:
                return _finish(maker.from_config(config, **kwargs), fused, setup, mtp_weight)
            prepare, here = PreTrainedModel.prepare_distribute_model, (None, torch.get_default_device(), None)
            layout, device, meshes = here if setup is None else prepare(_join(setup, fused))
            with initialization.no_init_weights(), torch.device("meta"), initialization.meta_device_safe_creation_ops():
                model = maker.from_config(config, **kwargs)
            if quantization is not None:
                pack(model, quantization)
            if setup is not None:
                model = model.maybe_distribute_model(model, layout, meshes)
            initialise_shards(model, device or torch.device("cpu"))
            return _finish(model, fused, setup, mtp_weight)


def _own_copy(config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """A copy of the caller's configuration, as models note their experts implementation there: others made from it stay
    stock, and "grouped_mm", which a stock model has noted there as its default, does not count as asked for."""
    config = copy.deepcopy(config)
    if "experts_implementation" not in kwargs and config._experts_implementation == "grouped_mm":
        config._experts_implementation = None
    return config


def _take_ours(kwargs: dict[str, Any]) -> tuple[bool | dict[str, bool], DistributedSetup | None, float | None]:
    """Take `fused`, `distributed_setup` and `mtp_loss_weight` out of the arguments; refuse what cannot be meant."""
    fused, weight = kwargs.pop("fused", True), kwargs.pop("mtp_loss_weight", None)
    setup = kwargs.pop("distributed_setup", None)
    if setup is not None:
        for name in ("distributed_config", "device_map", "device_mesh", "tp_plan", "tp_size"):
            if kwargs.get(name) is not None:
                raise ValueError(f"distributed_setup says where the model goes; leave {name}= out.")
        setup = create_distributed_setup_from_config(setup) if isinstance(setup, dict) else setup
        if not isinstance(setup, DistributedSetup):
            raise TypeError(f"distributed_setup must be a DistributedSetup or a dict, not {type(setup).__name__}.")
    if weight is None:
        return fused, setup, None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(
            f"mtp_loss_weight={weight!r}: give a positive number (DeepSeek-V3 was trained with 0.3, then 0.1), or "
            f"leave it out to keep the modules for multi-token prediction as they are."
        )
    if fused is False:
        raise ValueError("fused=False gives stock Transformers, which trains no MTP: leave mtp_loss_weight out.")
    if setup is not None and setup.tp_size > 1:
        raise ValueError(
            f"mtp_loss_weight does not work with tp_size={setup.tp_size}, which splits the head that the modules "
            f"share. Set tp_size to 1 and shard with dp_size and ep_size, or leave mtp_loss_weight out."
        )
    return fused, setup, float(weight)


def _join(setup: DistributedSetup, fused: bool | dict[str, bool]) -> Any:
    """Transformers' form of the setup, among ranks that all have it; a stock model gets Transformers' own dispatch."""
    if fused is False and setup.dispatch != AUTO:
        raise ValueError(
            f"fused=False gives stock Transformers, dispatch included: leave dispatch={setup.dispatch!r} out."
        )
    layout = setup.to_transformers(ep_implementation="auto" if fused is False else None)
    setup.join()
    return layout


def _finish(model: Any, fused: bool | dict[str, bool], setup: DistributedSetup | None, weight: float | None) -> Any:
    """The model, fused if it is not yet, its modules for multi-token prediction trained or frozen, laid out."""
    model = fuse(model, fused)
    mtp = getattr(model, "_mtp", None)
    if mtp is None and weight is not None:
        raise ValueError(
            f"mtp_loss_weight was given, but there are no modules for multi-token prediction: {type(model).__name__} "
            f"has none (DeepSeek V3, GLM-4.5 and Nemotron 3 have), num_nextn_predict_layers is 0, or the checkpoint "
            f"was saved without them. Leave mtp_loss_weight out, or take a checkpoint that has them."
        )
    if mtp is not None:
        model.mtp_loss_weight = weight
        for parameter in mtp.parameters_of(model):
            parameter.requires_grad_(weight is not None)
    if setup is not None:
        setup.apply_to(model)
    return model
