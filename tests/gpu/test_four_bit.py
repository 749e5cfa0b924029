"""Experts in 4 bits on a GPU: the kernel gives the reference's bits, and a step decodes into memory that is there."""

import peft
import pytest
import torch

from expertmesh import AutoModelForCausalLM, ExpertsQuantConfig
from expertmesh.kernels import packed as four_bit
from expertmesh.kernels.packed import FORMATS
from tests.kernels.test_four_bit import SHAPE, packed, same_bits
from tests.moe.test_four_bit import WIDTHS, config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_gives_the_bits_of_the_reference(format, dtype):
    torch.manual_seed(0)
    codes, scales = packed(format)
    expected = four_bit.decode_reference(codes, scales, format, torch.empty(SHAPE, dtype=dtype))
    got = four_bit.decode(codes.cuda(), scales.cuda(), format, torch.empty(SHAPE, dtype=dtype, device="cuda")).cpu()
    numbers = ~expected.isnan()
    assert torch.equal(got.isnan(), ~numbers) and same_bits(got[numbers], expected[numbers])


@pytest.mark.parametrize("family", WIDTHS)
def test_a_step_waits_for_nothing_and_takes_no_memory_of_a_weights_size(family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(
            config(family, **sizes), dtype=torch.bfloat16, quantization_config=ExpertsQuantConfig("nf4")
        )
    targets = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
    adapters = peft.LoraConfig(r=16, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, adapters).train()
    ids = torch.randint(3, 100, (2, 32), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    (buffer,) = base.experts_buffer._buffers.values()
    before = buffer.data_ptr()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids, labels=ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [made.data_ptr() for made in base.experts_buffer._buffers.values()] == [before]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
