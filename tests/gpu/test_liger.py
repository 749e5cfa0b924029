"""On a GPU a model without experts trains on Liger's kernels, and computes what stock computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM as StockAuto
from transformers import LlamaConfig, Qwen3Config

from expertmesh import AutoModelForCausalLM

pytest.importorskip("liger_kernel")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_a_dense_model_runs_on_liger_and_stays_right(family):
    config = family(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()  # on the CPU, as a script for Trainer does
    stock = StockAuto.from_config(config).cuda().train()
    stock.load_state_dict(model.state_dict())
    model = model.cuda()
    ids = torch.randint(0, 512, (2, 64), device="cuda")
    loss, want = model(input_ids=ids, labels=ids).loss, stock(input_ids=ids, labels=ids).loss
    loss.backward()
    want.backward()
    assert "forward" in vars(model.model.norm) and not model._forward_pre_hooks, "Liger is not in"
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert ((p.grad - q.grad).norm() / q.grad.norm()) < 5e-3, name
    after = StockAuto.from_config(config)
    assert torch.isfinite(after(ids.cpu()).logits).all(), "a later stock model on the CPU must be untouched"
