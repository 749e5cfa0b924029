"""What PEFT is told of models that are spread over ranks."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.packed import Packed


def patch_peft_layouts() -> None:
    """Let PEFT ask `_sizes` for a layer's, `_split` for how tensor parallelism splits it, `_written` for what it saves;
    once it is imported."""
    layer: Any = sys.modules.get("peft.tuners.lora.layer")
    lora: Any = sys.modules.get("peft.tuners.lora.model")
    model: Any = sys.modules.get("peft.peft_model")
    if model is None or isinstance(model.get_peft_model_state_dict, partial):
        return
    layer._get_in_out_features = partial(_sizes, layer._get_in_out_features)
    if hasattr(lora, "get_tp_plan_and_mesh"):
        lora.get_tp_plan_and_mesh = partial(_split, lora.get_tp_plan_and_mesh)
    model.get_peft_model_state_dict = partial(_written, model.get_peft_model_state_dict)


def _sizes(stock: Callable[[nn.Module], Any], module: nn.Module) -> Any:
    """(inputs, outputs) of a layer, which computes with its whole weight if FSDP shards that in several copies of the
    model; PEFT takes it for one that tensor parallelism splits."""
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    if isinstance(module, nn.Linear) and mesh is not None and "tp" not in (mesh.mesh_dim_names or ()):
        return module.in_features, module.out_features
    return stock(module)


def _split(stock: Callable[..., Any], model: Any, name: str) -> Any:
    """(plan, mesh) of a layer or parameter. Experts of a fused model are whole on their ranks, also under tensor
    parallelism, and so are their adapters."""
    whole = getattr(model, "in_fused_model", False) and name.rpartition(".")[0].endswith(".experts")
    return (None, None) if whole else stock(model, name)


def _written(stock: Callable[..., Any], model: Any, state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The tensors of an adapter. PEFT would gather all weights of a model that is spread over ranks, on each of them:
    here what it may write, which is adapters, frozen ones too, what else trains, embeddings and head."""
    if state_dict is None and hasattr(model, "get_input_embeddings"):
        ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
        small = {id(parameter) for end in ends for parameter in end.parameters()}
        spread = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, DTensor | Packed)]
        own = getattr(getattr(model, "base_model", None), "prefix", "lora_"), "modules_to_save."
        frozen = [(n, p) for n, p in spread if not p.requires_grad and not any(part in n for part in own)]
        left = {name for name, parameter in frozen if id(parameter) not in small}
        state_dict = {name: tensor for name, tensor in model.state_dict().items() if name not in left}
    return stock(model, state_dict, *args, **kwargs)
