"""Monkey-patches that make PEFT work with sharded models."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.packed import Packed


def patch_peft_layouts() -> None:
    """Patch PEFT, if it is imported and not patched yet: sizes of layers, tensor-parallel plans, and what it saves."""
    layer: Any = sys.modules.get("peft.tuners.lora.layer")
    lora: Any = sys.modules.get("peft.tuners.lora.model")
    model: Any = sys.modules.get("peft.peft_model")
    if model is None or isinstance(model.get_peft_model_state_dict, partial):
        return
    layer._get_in_out_features = partial(_in_out_features, layer._get_in_out_features)
    if hasattr(lora, "get_tp_plan_and_mesh"):
        lora.get_tp_plan_and_mesh = partial(_tp_plan_and_mesh, lora.get_tp_plan_and_mesh)
    model.get_peft_model_state_dict = partial(_adapter_state_dict, model.get_peft_model_state_dict)


def _in_out_features(stock: Callable[[nn.Module], Any], module: nn.Module) -> Any:
    """Return (in_features, out_features) of a layer. PEFT takes HSDP's shards of a weight for tensor-parallel ones."""
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    if isinstance(module, nn.Linear) and mesh is not None and "tp" not in (mesh.mesh_dim_names or ()):
        return module.in_features, module.out_features
    return stock(module)


def _tp_plan_and_mesh(stock: Callable[..., Any], model: Any, name: str) -> Any:
    """Return the tensor-parallel (plan, mesh) of a layer or parameter: (None, None) for experts of a fused model, which
    tensor parallelism does not split. Their adapters are not split either."""
    whole = getattr(model, "in_fused_model", False) and name.rpartition(".")[0].endswith(".experts")
    return (None, None) if whole else stock(model, name)


def _adapter_state_dict(
    stock: Callable[..., Any], model: Any, state_dict: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Return the tensors of an adapter. PEFT would gather all weights of a sharded model on every rank. This passes it
    only what it may save: adapters (frozen ones too), trainable parameters, embeddings and head."""
    if state_dict is None and hasattr(model, "get_input_embeddings"):
        ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
        end_ids = {id(parameter) for end in ends for parameter in end.parameters()}
        sharded = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, DTensor | Packed)]
        adapter_keys = getattr(getattr(model, "base_model", None), "prefix", "lora_"), "modules_to_save."
        frozen = [(n, p) for n, p in sharded if not p.requires_grad and not any(key in n for key in adapter_keys)]
        skipped = {name for name, parameter in frozen if id(parameter) not in end_ids}
        state_dict = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    return stock(model, state_dict, *args, **kwargs)
