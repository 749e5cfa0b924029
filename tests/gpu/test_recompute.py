"""On a GPU: what a layer recomputes comes again bit for bit, and a model keeps as much less as its plan says."""

import pytest
import torch

from expertmesh import AutoModelForCausalLM
from expertmesh.bench.works import WORKS, config_of
from expertmesh.plan.memory import Job, trace
from tests.kernels.test_recompute import assert_pieces_come_again

LEVELS = "light", "experts", "full", "offload"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_piece_comes_again_bit_for_bit(dtype):
    assert_pieces_come_again("cuda", dtype)


def test_loss_gradients_and_memory_of_a_model():
    config = config_of(WORKS["qwen3-30b-a3b"], 2)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.randint(3, config.vocab_size, (1, 4096))
    found = {}
    for level in (False, "none again", *LEVELS):
        if level in LEVELS:
            model.activation_checkpointing_enable({"recompute": level})
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found[level] = kept, loss.item(), [p.grad.float() for p in model.parameters()]
        model.zero_grad()

    def apart(level):
        """How far gradients are from those of the first step, by their norms."""
        pairs = zip(found[level][2], found[False][2], strict=True)
        return max((a - b).norm() / b.norm() for a, b in pairs).item()

    for level in LEVELS:
        planned = [sum(trace(Job(config, recompute=one), 140 * 2**30).kept.values()) for one in (False, level)]
        assert found[False][0] - found[level][0] == pytest.approx(planned[0] - planned[1], rel=0.05)
        assert found[level][1] == found[False][1]
        assert apart(level) <= 2 * apart("none again"), level  # flash-attn-4's backward adds up by atomics
