"""What ranks do with experts in 4 bits, and the same on one process."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.kernels import packed as kernel
from expertmesh.kernels.packed import Packed, packed_in
from expertmesh.parallel.setup import DistributedSetup
from tests.distributed.work import Case, adapt, loss_of, reference

TARGETS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}


def load(folder: Path, format: str, **options: Any) -> Any:
    """The model of a folder with its experts in 4 bits, loaded or packed while it is loaded, in float32."""
    quantization = ExpertsQuantConfig(format)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, **options
    ).train()


def parts(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (codes, scales) of the experts that this rank holds} of what is packed."""
    found = {name: held for name, weight in model.named_parameters() if (held := packed_in(weight)) is not None}
    return {name: (held.codes, held.scales) for name, held in found.items()}


def alone(folder: Path, format: str, dp_size: int) -> tuple[dict, float, dict]:
    """(what is packed, loss, the adapters' gradients) of the batches of so many ranks on one process."""
    model = load(folder, format)
    held = parts(model)
    found = reference(adapt(model, **TARGETS), dp_size, None)
    return held, found["loss"], {name: grad for name, grad in found["grads"].items() if "lora" in name}


def trained(rank: int, folder: Path, format: str, cases: list[Case]) -> list[tuple[dict, float, dict]]:
    """The same of every case on this rank, which drew other adapters unless it is the first."""
    results = []
    for case in cases:
        setup = DistributedSetup(**case.setup, activation_checkpointing=case.recompute)
        model = load(folder, format, distributed_setup=setup)
        held = parts(model)
        for name, weight in model.named_parameters():
            if name in held:
                assert isinstance(weight, DTensor if setup.ep_size > 1 else Packed) and not weight.requires_grad
                assert packed_in(weight).buffer is model.experts_buffer
        adapt(model, rank, **TARGETS)
        model.enable_input_require_grads()
        loss = loss_of(model, setup, rank)
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        grads = {name: p.grad for name, p in model.named_parameters() if "lora" in name}
        results.append((held, float(loss) / dist.get_world_size(), grads))
    return results


def saved(rank: int, folder: Path, setup: dict[str, Any], out: Path) -> set[int]:
    """How many experts at once were packed on this rank, of a model that its ranks load and write."""
    encode, packed = kernel.encode, set()

    def counted(weight: torch.Tensor, *rest: Any) -> None:
        packed.add(len(weight))
        encode(weight, *rest)

    with mock.patch.object(kernel, "encode", counted):
        load(folder, "nf4", distributed_setup=DistributedSetup(**setup)).save_pretrained(out)
    return packed


def drawn(rank: int, config: Any, setups: list[dict[str, Any]]) -> list[dict]:
    """What this rank holds of new weights under each layout."""
    held = []
    for setup in setups:
        torch.manual_seed(rank)
        options = {"quantization_config": ExpertsQuantConfig("nf4"), "distributed_setup": DistributedSetup(**setup)}
        held.append(parts(AutoModelForCausalLM.from_config(config, **options)))
    return held


def gathered(rank: int, folder: Path, out: Path) -> dict[str, int]:
    """How many numbers PEFT gathers to save adapters of a bfloat16 model and of one in 4 bits."""
    import peft

    found, real = {}, DTensor.full_tensor
    for format in (None, "nf4"):
        options = {} if format is None else {"quantization_config": ExpertsQuantConfig(format)}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, distributed_setup={"ep_size": 2}, **options
        )
        numbers = []

        def counted(self: DTensor, *args: Any, numbers: list[int] = numbers, **kwargs: Any) -> torch.Tensor:
            numbers.append(self.numel())
            return real(self, *args, **kwargs)

        adapted = peft.get_peft_model(model, peft.LoraConfig(**TARGETS, init_lora_weights=False))
        with mock.patch.object(DTensor, "full_tensor", counted):
            adapted.save_pretrained(out / str(format), is_main_process=rank == 0)
        found[str(format)] = sum(numbers)
    return found
