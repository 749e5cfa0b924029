"""Multi-token prediction on several ranks: the gradients of one process, and every weight saved again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertmesh import AutoModelForCausalLM
from tests.distributed import work
from tests.distributed.ranks import on_ranks, on_the_same_ranks
from tests.layers.test_mtp import WEIGHT, load, on_disk, saved
from tests.models import load_stock
from tests.models import saved as saved_without

FAMILIES = ("deepseek_v3", "nemotron_h")  # GLM-4.5 keeps its modules as DeepSeek V3 does

CASES = [
    ({"ep_size": 2}, {}),
    ({}, {"activation_checkpointing": True}),
    ({"ep_size": 2, "dispatch": "gather"}, {"activation_checkpointing": True}),
    ({"dp_replicate_size": 2}, {}),
]


def train_and_save(rank: int, folder: Path, want: Path, out: Path) -> list[tuple]:
    """For every case of training: (loss, worst gradient error and its name, after two forwards and backwards)."""
    reference, results = torch.load(want), []
    for sizes, options in CASES:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_setup=sizes | options, mtp_loss_weight=WEIGHT
        ).train()
        setup = work.DistributedSetup(**sizes)
        for _ in range(2):  # the second finds what the first has left behind
            model.zero_grad()
            loss = work.loss_of(model, setup, rank)
            loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        grads = {name: work.full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        error, name = work.worst(grads, reference["grads"])
        results.append((abs(float(mean) / 2 - reference["loss"]) / reference["loss"], error, name))
    model.save_pretrained(out / "trained")
    return results


def keep_and_save(rank: int, folder: Path, out: Path) -> list[str]:
    """Load without training them, under every layout, take a step of the rest, and save."""
    left = []
    for number, sizes in enumerate(({"ep_size": 2}, {}, {"tp_size": 2})):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_setup=sizes).train()
        work.loss_of(model, work.DistributedSetup(**sizes), rank).backward()
        left += [name for name, p in model.named_parameters() if (p.grad is None) != model._mtp.owns(name)]
        model.save_pretrained(out / str(number))
    return left


def dropped(rank: int, folder: Path) -> tuple[bool, float]:
    """A checkpoint without the weights that its configuration speaks of."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_setup={"ep_size": 2}, num_nextn_predict_layers=1
    ).train()
    loss = work.loss_of(model, work.DistributedSetup(ep_size=2), rank)
    loss.backward()
    return model._mtp is None, float(loss)


def refused(rank: int, folder: Path) -> str:
    """The errors of a layout that splits the head, and of a sharded head that makes logits."""
    with pytest.raises(ValueError) as split:
        AutoModelForCausalLM.from_pretrained(folder, distributed_setup={"tp_size": 2}, mtp_loss_weight=0.1)
    options: dict[str, Any] = {"fused": {"linear_cross_entropy": False}, "distributed_setup": {"ep_size": 2}}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, mtp_loss_weight=0.1, **options).train()
    with pytest.raises(ValueError) as logits:
        work.loss_of(model, work.DistributedSetup(ep_size=2), rank)
    return f"{split.value} {logits.value}"


def made(rank: int, family: str) -> dict[str, torch.Tensor]:
    """Weights of a new model."""
    torch.manual_seed(rank)
    config = work.tiny_config(family, num_nextn_predict_layers=1)
    model = AutoModelForCausalLM.from_config(config, distributed_setup={"ep_size": 2}, mtp_loss_weight=0.1)
    work.loss_of(model.train(), work.DistributedSetup(ep_size=2), rank).backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: work.full(p.detach()) for name, p in model.named_parameters()}


def test_losses_and_gradients_are_those_of_one_process(tmp_path):
    several = [(saved(family), tmp_path / f"{family}.pt", tmp_path / family) for family in FAMILIES]
    for family, (_, want, _) in zip(FAMILIES, several, strict=True):
        torch.save(work.reference(load(family), 2, None), want)
    for family, ranks in zip(FAMILIES, on_the_same_ranks(2, train_and_save, several), strict=True):
        for rank in ranks:
            assert len(rank) == len(CASES)
            for loss, grad, name in rank:
                assert loss <= 1e-5 and grad <= 1e-5, (family, loss, grad, name)
        same_weights(tmp_path / family / "trained", saved(family))


def test_kept_weights_are_saved_byte_equal_under_every_layout(tmp_path):
    several = [(saved(family), tmp_path / family) for family in FAMILIES]
    assert on_the_same_ranks(2, keep_and_save, several) == [[[], []]] * 2
    for family in FAMILIES:
        for number in range(3):
            same_weights(tmp_path / family / str(number), saved(family))


def same_weights(got: Path, want: Path) -> None:
    tensors, originals = on_disk(got), on_disk(want)
    assert tensors.keys() == originals.keys()
    assert not [key for key in originals if not torch.equal(tensors[key], originals[key])]


def test_a_checkpoint_without_them_loads_as_ever():
    several = [(saved_without(family),) for family in FAMILIES]
    for family, found in zip(FAMILIES, on_the_same_ranks(2, dropped, several), strict=True):
        assert all(absent for absent, _ in found)
        want = work.reference(load_stock(family), 2, None)["loss"]
        assert sum(loss for _, loss in found) / 2 == pytest.approx(want, rel=1e-5)


def test_tensor_parallel_training_is_refused_and_new_models_are_made():
    for error in on_ranks(2, refused, saved("deepseek_v3")):
        assert "Set tp_size to 1" in error and "leave the fusion linear_cross_entropy on" in error
    first, second = on_ranks(2, made, "nemotron_h")
    assert any(name.startswith("mtp.") for name in first) and all(torch.equal(first[n], second[n]) for n in first)
