"""What PEFT is told of models that are spread over ranks, without ranks."""

from unittest import mock

import pytest
from torch.distributed.tensor import DTensor

from expertmesh.parallel import peft


def test_frozen_adapters_that_ranks_share_out_are_written_and_the_base_is_not():
    """As tensor parallelism splits them, and FSDP what is in `modules_to_save`: a loaded adapter is frozen."""
    names = "q.base_layer.weight q.lora_A.default.weight gate.modules_to_save.default.weight embed.weight".split()
    spread = {name: mock.Mock(spec=DTensor, requires_grad=False) for name in names}
    embedding = mock.Mock(parameters=lambda: [spread["embed.weight"]])
    model = mock.Mock(
        named_parameters=lambda **_: spread.items(), state_dict=lambda: dict(spread),
        base_model=mock.Mock(prefix="lora_"), get_input_embeddings=lambda: embedding,
        get_output_embeddings=lambda: None,
    )  # fmt: skip
    assert list(peft._adapter_state_dict(lambda model, tensors: tensors, model)) == names[1:]


@pytest.mark.parametrize("fused", [True, False])
def test_only_experts_of_fused_models_are_whole_under_tensor_parallelism(fused):
    model, stock = mock.Mock(in_fused_model=fused), lambda model, name: ("rowwise", "mesh")
    for name in ("layers.0.mlp.experts.0.down_proj", "layers.0.mlp.shared_experts.down_proj"):
        assert peft._tp_plan_and_mesh(stock, model, name) == ("rowwise", "mesh")
    of_experts = peft._tp_plan_and_mesh(stock, model, "layers.0.mlp.experts.down_proj")
    assert of_experts == ((None, None) if fused else ("rowwise", "mesh"))
