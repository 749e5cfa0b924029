"""Interrupted and resumed equals uninterrupted: from a plain loop, in any layout, saved now or in the background."""

import os
import pathlib
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import nn

from expertmesh.bench.tiny import tiny_model
from expertmesh.checkpoint.optimizer import load_optimizer, regrouped
from expertmesh.checkpoint.publish import MANIFEST, checkpoints
from expertmesh.checkpoint.state import BackgroundSaver, load_checkpoint, save_checkpoint
from expertmesh.weights.files import DamagedError, sha256_sums
from tests.checkpoint.loop import loop, on, source
from tests.distributed.ranks import on_ranks


def same(one, other) -> bool:
    """Whether two dumps, or parts of them, agree bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_process_goes_on_bit_for_bit(family, background, tmp_path):
    options = {"source": str(source(tmp_path, family)), "steps": 4, "save_every": 2, "background": background}
    loop(**options, output=str(tmp_path / "whole"), dump=tmp_path / "whole.pt")
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    loop(**options, output=str(tmp_path / "resumed"), dump=tmp_path / "resumed.pt", resume=checkpoint)
    whole, resumed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")
    assert len(set(whole["losses"])) == 4
    assert same(whole, resumed)


@pytest.mark.parametrize("optimizer", ["ours", "SGD", "Adagrad", "Adamax", "NAdam", "RMSprop"])
def test_other_optimizers(optimizer, tmp_path):
    options = {"source": str(source(tmp_path, "mixtral")), "steps": 2, "save_every": 1, "optimizer": optimizer}
    loop(**options, output=str(tmp_path / "whole"), dump=tmp_path / "whole.pt")
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    loop(**options, output=str(tmp_path / "resumed"), dump=tmp_path / "resumed.pt", resume=checkpoint)
    assert same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt"))


def test_layouts(tmp_path):
    """2 ranks with EP -> the same, bit for bit; -> 1 process; -> 4 ranks -> 2 ranks without EP: the same state."""
    model, folder = {"source": str(source(tmp_path, "qwen3_moe"))}, str(tmp_path / "run")
    two, four = {"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 2}
    at_two, at_three = f"{folder}/checkpoint-2", f"{folder}/checkpoint-3"

    def dump(name):
        return str(tmp_path / f"{name}.pt")

    def train(ranks, **options):
        on_ranks(ranks, on, model | options)

    train(2, layout=two, steps=4, save_every=2, output=folder, dump=dump("whole"))
    train(2, layout=two, steps=4, resume=at_two, dump=dump("resumed"), dump_loaded=dump("two"))
    loop(**model, steps=2, resume=at_two, dump=dump("one"))
    background = {"background": True, "save_every": 3, "output": folder}
    train(4, layout=four, steps=3, resume=at_two, dump=dump("four"), dump_loaded=dump("loaded"), **background)
    train(2, layout={"fsdp_size": 2}, steps=3, resume=at_three, dump=dump("plain"))
    for one, other in (("whole", "resumed"), ("two", "one"), ("two", "loaded"), ("four", "plain")):
        assert same(torch.load(dump(one)), torch.load(dump(other))), (one, other)


@pytest.mark.parametrize("layout", [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=str)
def test_a_checkpoint_of_one_process_goes_on_on_two_ranks(layout, tmp_path):
    """ERNIE's routers have a frozen bias in a module of its own, which has no state in the optimizer."""
    model, folder = {"source": str(source(tmp_path, "ernie4_5_moe"))}, tmp_path / "run"
    loop(**model, steps=1, save_every=1, output=str(folder), dump=tmp_path / "one.pt")
    resumed = {"resume": str(folder / "checkpoint-1"), "dump_loaded": str(tmp_path / "two.pt")}
    on_ranks(2, on, model | resumed | {"layout": layout, "steps": 2, "save_every": 2, "output": str(folder)})
    assert same(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"))
    loop(**model, steps=2, resume=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("layout", [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=str)
def test_a_bfloat16_model_whose_routers_are_float32(layout, tmp_path):
    """So Transformers 5.24 keeps them: resumed on the same ranks bit for bit, and the same state in one process."""
    options = {"source": str(source(tmp_path, "deepseek_v3")), "dtype": "bfloat16", "optimizer": "ours"}
    checkpoint, names = str(tmp_path / "run" / "checkpoint-1"), ("whole", "resumed", "loaded", "alone")
    dumps = {name: str(tmp_path / f"{name}.pt") for name in names}
    output = {"save_every": 1, "output": str(tmp_path / "run")}
    on_ranks(2, on, options | output | {"layout": layout, "steps": 2, "dump": dumps["whole"]})
    resumed = {"layout": layout, "steps": 2, "dump": dumps["resumed"], "dump_loaded": dumps["loaded"]}
    on_ranks(2, on, options | resumed | {"resume": checkpoint})
    loop(**options, steps=1, resume=checkpoint, dump=dumps["alone"])
    whole, resumed, loaded, alone = (torch.load(dumps[name]) for name in names)
    assert same(whole, resumed) and same(loaded, alone) and not same(whole, loaded)


def pair(frozen: bool = False):
    model = tiny_model("qwen3_moe")
    model.lm_head.weight.requires_grad_(not frozen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(parameters)


def test_a_checkpoint_is_a_model_directory(tmp_path):
    model, optimizer = pair()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    loaded = type(model).from_pretrained(path)
    assert same(dict(model.state_dict()), dict(loaded.state_dict()))


def test_state_that_does_not_exist_yet_is_not_invented(tmp_path):
    model, optimizer = pair()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    assert not optimizer.state
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert not optimizer.state


def test_state_keeps_its_dtype_under_low_precision_weights(tmp_path):
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.lm_head.weight
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(weight.shape)}
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other = torch.optim.AdamW(model.parameters())
    load_checkpoint(path, model=model, optimizer=other)
    assert other.state[weight]["exp_avg"].dtype == torch.float32
    assert same(optimizer.state[weight], other.state[weight])


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    model, optimizer = pair()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.ones_(model.lm_head.weight)
    before["lm_head.weight"].fill_(1)
    with pytest.raises(DamagedError, match="model.safetensors has changed"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert same(before, dict(model.state_dict()))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def signed_again(checkpoint):
    """Writes the manifest anew after a test has changed files, as a forger would."""
    os.remove(checkpoint / MANIFEST)
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    (checkpoint / MANIFEST).write_text(
        "".join(f"{sum}  {name}\n" for name, sum in sha256_sums(checkpoint, files).items())
    )


def forge_file(name):
    return lambda checkpoint, ran: torch.save({"step": 1, "x": Payload(ran)}, checkpoint / name)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (forge_file("run.pt"), "Weights only load failed"),
        (forge_file("optimizer/groups.pt"), "Weights only load failed"),
        (forge_file("optimizer/shard-00001-model-00001-of-00001.safetensors"), "header"),
    ],
)
def test_nothing_in_a_checkpoint_can_run(forge, message, tmp_path):
    model, optimizer = pair()
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(parameter)}
    path = save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer, step=1)
    load_checkpoint(path, model=model, optimizer=optimizer)
    forge(path, tmp_path / "ran")
    with pytest.raises(DamagedError, match="is not what was saved"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    signed_again(path)
    before = optimizer.state[model.lm_head.weight]
    with pytest.raises((pickle.UnpicklingError, SafetensorError), match=message):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert not (tmp_path / "ran").exists()
    assert optimizer.state[model.lm_head.weight] is before


def test_a_shard_that_is_gone_is_missed(tmp_path):
    """Also where no manifest counts the files."""
    model, optimizer = pair()
    optimizer.state[model.lm_head.weight] = {"step": torch.tensor(1.0)}
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    (shard,) = (path / "optimizer").glob("*.safetensors")
    shard.unlink()
    with pytest.raises(ValueError, match="has lost some of its files"):
        load_optimizer(path, model, optimizer)


def test_state_is_written_in_files_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("expertmesh.checkpoint.optimizer.FILE", 10_000)
    model, optimizer = pair()
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.randn(parameter.shape)}
    state = {weight: dict(values) for weight, values in optimizer.state.items()}
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    largest = max(value["exp_avg"].nbytes for value in state.values())
    sizes = [file.stat().st_size for file in (path / "optimizer").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 20_000 + largest
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert all(same(dict(optimizer.state[weight]), values) for weight, values in state.items())


def test_state_that_is_a_number_comes_back_as_one(tmp_path):
    model, _ = pair()
    optimizer = transformers.Adafactor(model.parameters())
    ids = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert optimizer.state[model.lm_head.weight]["step"] == 1
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other = transformers.Adafactor(model.parameters())
    load_checkpoint(path, model=model, optimizer=other)
    assert all(same(optimizer.state[weight], other.state[weight]) for weight in optimizer.state)
    assert type(other.state[model.lm_head.weight]["step"]) is int


def test_state_that_cannot_be_saved_is_refused(tmp_path):
    model, optimizer = pair()
    optimizer.state[model.lm_head.weight] = {"step": torch.tensor(1.0), "history": [torch.zeros(1)]}
    with pytest.raises(ValueError, match="keeps a list as 'history'.*tensors and numbers"):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)


def test_the_step_and_all_random_numbers_come_back(tmp_path):
    model, optimizer = pair()
    transformers.set_seed(3)
    random.random(), np.random.rand(), torch.rand(1)
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=7)
    coming = random.random(), np.random.rand(), torch.rand(1)
    transformers.set_seed(4)
    assert path == tmp_path / "checkpoint-7"
    assert load_checkpoint(path, model=model, optimizer=optimizer).step == 7
    assert coming == (random.random(), np.random.rand(), torch.rand(1))


def test_other_parameters_are_refused_by_name(tmp_path):
    model, optimizer = pair()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    model, optimizer = pair(frozen=True)
    with pytest.raises(ValueError, match=r"only the checkpoint has lm_head.weight. Freeze"):
        load_checkpoint(path, model=model, optimizer=optimizer)


def test_what_could_not_be_read_back_is_refused_at_once(tmp_path):
    model, optimizer = pair()
    with pytest.raises(ValueError, match="`extra`.*not other objects"):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, extra={"loader": nn.Identity()})
    assert not list(tmp_path.iterdir())


def refused(rank, folder):
    """Rank 1 alone has what could not be read back."""
    dist.init_process_group("gloo")
    model, optimizer = pair()
    with pytest.raises(ValueError, match="`extra`.*not other objects"):
        save_checkpoint(
            folder, model=model, optimizer=optimizer, step=1, extra={"loader": nn.Identity()} if rank else {}
        )


def test_what_could_not_be_read_back_on_one_rank_is_refused_on_all(tmp_path):
    on_ranks(2, refused, tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_transformers_models_have_checkpoints(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Transformers models, not of Linear"):
        save_checkpoint(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters()), step=1)


def test_so_many_checkpoints_stay_and_a_scheduler_that_was_not_saved_is_missed(tmp_path):
    model, optimizer = pair()
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
    with pytest.raises(ValueError, match="saved without a scheduler"):
        load_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert (model.lm_head.weight == 7).all(), "nothing was loaded"


@pytest.mark.parametrize("whose", ["an older version's", "a Trainer's"])
def test_a_checkpoint_of_another_kind_is_refused_before_anything_changes(whose, tmp_path):
    model, optimizer = pair()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    if whose == "a Trainer's":
        (path / "run.pt").unlink()
    else:
        torch.save({"step": 1, "scheduler": None, "world_size": 1}, path / "run.pt")
    signed_again(path)
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
    with pytest.raises(ValueError, match="a Trainer's is resumed by the Trainer, an older one by the expertmesh that"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert (model.lm_head.weight == 7).all()


def test_options_come_back_but_for_those_of_the_kernels_and_groups_may_not_join_different_ones(tmp_path):
    model, _ = pair()
    first, *rest = model.parameters()
    saved = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": rest, "lr": 0.25}], foreach=True)
    path = save_checkpoint(tmp_path, model=model, optimizer=saved, step=1)
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [first]}], foreach=False)
    optimizer.state[first] = {"step": torch.tensor(7.0)}  # of another run
    assert load_optimizer(path, model, optimizer) == [1, 0] and not optimizer.state
    assert [(group["lr"], group["foreach"]) for group in optimizer.param_groups] == [(0.25, False), (0.5, False)]
    with pytest.raises(ValueError, match="joins parameters that had different options"):
        load_optimizer(path, model, torch.optim.AdamW(model.parameters()))


def test_what_a_scheduler_keeps_for_each_group_is_put_in_their_order():
    state = {"base_lrs": [1, 2], "last_epoch": 3, "_schedulers": [{"_last_lr": [4, 5]}, 6], "_milestones": [7, 8]}
    want = {"base_lrs": [2, 1], "last_epoch": 3, "_schedulers": [{"_last_lr": [5, 4]}, 6], "_milestones": [7, 8]}
    assert regrouped(state, [1, 0]) == want


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    model, optimizer = pair()
    model(input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state[model.lm_head.weight]["exp_avg"].clone()
    with BackgroundSaver() as saver:
        saver.save(tmp_path, model=model, optimizer=optimizer, step=1)
        optimizer.step()  # while the files are written
    assert not torch.equal(moment, optimizer.state[model.lm_head.weight]["exp_avg"])
    load_checkpoint(tmp_path / "checkpoint-1", model=model, optimizer=optimizer)
    assert same(weights, dict(model.state_dict()))
    assert torch.equal(moment, optimizer.state[model.lm_head.weight]["exp_avg"])


def test_an_error_in_the_background_surfaces(tmp_path):
    model, optimizer = pair()
    (tmp_path / "checkpoint-1").mkdir()
    for later in ([], [2]):
        with pytest.raises(FileExistsError), BackgroundSaver() as saver:
            for step in (1, *later):
                saver.save(tmp_path, model=model, optimizer=optimizer, step=step)
