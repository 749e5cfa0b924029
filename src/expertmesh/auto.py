"""AutoModelForCausalLM: a subclass of Transformers' class of the same name that creates fused models.

Its mapping from configuration to model class returns the fused twin of each class with pluggable experts. The rest of
loading is Transformers' own code, so all arguments of `from_pretrained` and `from_config` work as in Transformers.
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
    """Transformers' mapping {configuration class: model class}, with fused classes if their experts are pluggable."""

    def __init__(self) -> None:
        self.__dict__.update(vars(_STOCK))  # shared state: classes registered later are visible, too

    def __getitem__(self, config_class: type) -> Any:
        stock = super().__getitem__(config_class)
        return tuple(map(fused_class, stock)) if isinstance(stock, tuple) else fused_class(stock)


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """Transformers' `AutoModelForCausalLM`, whose Mixture-of-Experts models train several times faster.

    It takes all arguments of Transformers and three more:
    fused (True): False returns the stock model. A dict switches individual fusions off, such as {"router": False}.
    distributed_setup (None): a `DistributedSetup`, or the same as a dict, shards the model. Each rank loads its part.
    mtp_loss_weight (None): a positive number trains the modules for multi-token prediction of DeepSeek V3, GLM-4.5 and
    Nemotron 3 with this weight of their loss. With None modules from a checkpoint stay unchanged. Both ways they are
    saved again. `num_nextn_predict_layers=0` leaves them out.
    """

    _model_mapping: Any = _FusedMapping()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in Transformers, plus `fused`, `distributed_setup` and `mtp_loss_weight`.

        Raises ValueError if
        - weights of a folder differ from its SHA256SUMS (the check reads every file once),
        - weights are missing, which Transformers would initialize randomly, and `output_loading_info` is not set,
        - the setup does not fit the model or the number of ranks, or
        - `mtp_loss_weight` is set but there are no MTP modules.
        """
        fused, setup, mtp_weight = _pop_our_arguments(kwargs)
        loader: Any = super() if fused is not False else transformers.AutoModelForCausalLM
        if setup is not None:
            kwargs["distributed_config"] = _to_transformers(setup, fused)
        verify_sums(pretrained_model_name_or_path, together=setup is not None)
        if fused is not False and isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = _copy_config(kwargs["config"], kwargs)
        reports_missing = kwargs.get("output_loading_info", False)  # the caller gets the names of missing weights
        with loading(fused, mtp=True, complete=not reports_missing):
            loaded = loader.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
            model = _finalize(model, fused, setup, mtp_weight)
            return (model, *info) if info else model

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """As in Transformers, plus `fused`, `distributed_setup` and `mtp_loss_weight`. MTP modules need the latter.

        With a setup each rank holds at most its part and one full layer. The weights then depend only on rank 0's torch
        seed, for every layout, but differ from those without a setup. With quantization_config, an
        `ExpertsQuantConfig`, the weights are drawn as with a setup.
        """
        fused, setup, mtp_weight = _pop_our_arguments(kwargs)
        quantization = kwargs.pop("quantization_config", None)
        maker: Any = super() if fused is not False else transformers.AutoModelForCausalLM
        if quantization is not None and not isinstance(quantization, ExpertsQuantConfig):
            raise ValueError("from_config supports only an ExpertsQuantConfig as quantization_config.")
        if fused is not False or setup is not None:  # a layout is stored in the configuration, too
            config = _copy_config(config, kwargs)
        with loading(fused, mtp=mtp_weight is not None):
            if setup is None and quantization is None:
                return _finalize(maker.from_config(config, **kwargs), fused, setup, mtp_weight)
            prepare, local = PreTrainedModel.prepare_distribute_model, (None, torch.get_default_device(), None)
            layout, device, meshes = local if setup is None else prepare(_to_transformers(setup, fused))
            with initialization.no_init_weights(), torch.device("meta"), initialization.meta_device_safe_creation_ops():
                model = maker.from_config(config, **kwargs)
            if quantization is not None:
                pack(model, quantization)
            if setup is not None:
                model = model.maybe_distribute_model(model, layout, meshes)
            initialise_shards(model, device or torch.device("cpu"))
            return _finalize(model, fused, setup, mtp_weight)


def _copy_config(config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Return a copy of the configuration, because models store their experts implementation in it. The copy resets
    "grouped_mm", which a stock model may have stored as its default, unless the caller passes an implementation."""
    config = copy.deepcopy(config)
    if "experts_implementation" not in kwargs and config._experts_implementation == "grouped_mm":
        config._experts_implementation = None
    return config


def _pop_our_arguments(kwargs: dict[str, Any]) -> tuple[bool | dict[str, bool], DistributedSetup | None, float | None]:
    """Take `fused`, `distributed_setup` and `mtp_loss_weight` from the arguments and validate them."""
    fused, weight = kwargs.pop("fused", True), kwargs.pop("mtp_loss_weight", None)
    setup = kwargs.pop("distributed_setup", None)
    if setup is not None:
        for name in ("distributed_config", "device_map", "device_mesh", "tp_plan", "tp_size"):
            if kwargs.get(name) is not None:
                raise ValueError(f"distributed_setup already places the model: leave {name}= out.")
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


def _to_transformers(setup: DistributedSetup, fused: bool | dict[str, bool]) -> Any:
    """Return Transformers' form of the setup. All ranks must call this. A stock model uses Transformers' dispatch."""
    if fused is False and setup.dispatch != AUTO:
        raise ValueError(
            f"fused=False gives stock Transformers, dispatch included: leave dispatch={setup.dispatch!r} out."
        )
    layout = setup.to_transformers(ep_implementation="auto" if fused is False else None)
    setup.join()
    return layout


def _finalize(model: Any, fused: bool | dict[str, bool], setup: DistributedSetup | None, weight: float | None) -> Any:
    """Fuse the model if it is not fused, set which MTP modules train, apply the setup, and return the model."""
    model = fuse(model, fused)
    mtp = getattr(model, "_mtp", None)
    if mtp is None and weight is not None:
        raise ValueError(
            f"mtp_loss_weight was given, but there are no modules for multi-token prediction: {type(model).__name__} "
            f"does not support them (DeepSeek V3, GLM-4.5 and Nemotron 3 do), num_nextn_predict_layers is 0, or the "
            f"checkpoint has none. Leave mtp_loss_weight out, or use a checkpoint that has them."
        )
    if mtp is not None:
        model.mtp_loss_weight = weight
        for parameter in mtp.parameters_of(model):
            parameter.requires_grad_(weight is not None)
    if setup is not None:
        setup.apply_to(model)
    return model
