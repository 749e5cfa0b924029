"""Save and resume on a GPU: random numbers of the device, weights and state in bfloat16, background copies."""

import pytest
import torch

from expertmesh.checkpoint.state import BackgroundSaver, load_checkpoint, save_checkpoint
from tests.models import load_ours

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def prepared(fused_optimizer: bool):
    model = load_ours("qwen3_moe", dtype=torch.bfloat16, attention_dropout=0.1).cuda().train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused_optimizer)


def step(model, optimizer) -> None:
    ids = torch.randint(0, 128, (2, 16), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused_optimizer", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_weights_state_and_random_numbers_come_back(background, fused_optimizer, tmp_path):
    model, optimizer = prepared(fused_optimizer)
    step(model, optimizer)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = {p: {key: value.clone() for key, value in entry.items()} for p, entry in optimizer.state.items()}
    if background:
        with BackgroundSaver() as saver:
            saver.save(tmp_path, model=model, optimizer=optimizer, step=1)
            numbers = torch.rand(4, device="cuda")
            step(model, optimizer)  # while the files are written
    else:
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
        numbers = torch.rand(4, device="cuda")
    other, its_optimizer = prepared(fused_optimizer)
    load_checkpoint(tmp_path / "checkpoint-1", model=other, optimizer=its_optimizer)
    assert torch.equal(torch.rand(4, device="cuda"), numbers)
    for name, value in weights.items():
        assert torch.equal(other.state_dict()[name], value), name
    for before, parameter in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in state[before].items():
            found = its_optimizer.state[parameter][key]
            assert torch.equal(found, value) and found.device == value.device and found.dtype == value.dtype, key
    step(other, its_optimizer)
