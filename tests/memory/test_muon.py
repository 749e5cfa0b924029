"""Muon: on every matrix PyTorch's, also of stacks and of shards; it clips, refuses, resumes and moves as AdamW does."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import expertmesh
from expertmesh.checkpoint.optimizer import load_optimizer, state_of, write_optimizer
from expertmesh.memory import muon
from expertmesh.parallel import ranks
from expertmesh.train.config import ConfigError, load_config
from expertmesh.train.run import build, run
from tests.distributed.ranks import on_ranks
from tests.models import load_ours
from tests.train.runs import tiny_run
from tests.train.test_resume import trainer

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
HIDDEN = ["wide.weight", "tall.weight", "experts.up"]


class Model(nn.Module):
    """Two matrices, a stack of experts with biases, a norm and an embedding."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.wide, self.tall = nn.Linear(24, 7), nn.Linear(6, 16)
        self.experts = nn.Module()
        self.experts.is_concatenated = self.experts.has_gate = True  # what marks experts
        self.experts.up, self.experts.up_bias = nn.Parameter(torch.empty(4, 8, 10)), nn.Parameter(torch.empty(4, 8))
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            nn.init.normal_(weight, generator=generator)
        self.to(dtype)

    def backward(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            laid_out = [weight.device_mesh, weight.placements] if isinstance(weight, DTensor) else []
            weight.grad = distribute_tensor(grad, *laid_out, src_data_rank=None) if laid_out else grad


def steps(optimizer: torch.optim.Optimizer, model: Model, numbers: range) -> None:
    for number in numbers:
        model.backward(number)
        optimizer.step()


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def everything(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: whole(weight) for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        found |= {f"{name}/{key}": whole(x) for key, x in optimizer.state[weight].items() if torch.is_tensor(x)}
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype and torch.equal(x, other[name]), name


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("how", muon.ADJUSTMENTS)
def test_every_matrix_is_stepped_as_by_pytorch_and_the_rest_as_by_adamw(how, nesterov):
    model, other = Model(), Model()
    mine = expertmesh.Muon(model, **OPTIONS, adjust_lr_fn=how, nesterov=nesterov)
    theirs = dict(other.named_parameters())
    matrices = [theirs["wide.weight"], theirs["tall.weight"]]
    slices = [nn.Parameter(matrix.detach().clone()) for matrix in theirs["experts.up"]]
    on_matrices = torch.optim.Muon([*matrices, *slices], **OPTIONS, adjust_lr_fn=how, nesterov=nesterov)
    rest = {name: weight for name, weight in theirs.items() if name not in HIDDEN}
    decayed = [weight for name, weight in rest.items() if name == "embed.weight"]
    groups = [{"params": decayed}, {"params": [w for w in rest.values() if w.ndim < 2 or w.shape == (4, 8)]}]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    on_rest = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(4):
        model.backward(step)
        other.backward(step)
        for matrix, grad in zip(slices, theirs["experts.up"].grad, strict=True):
            matrix.grad = grad
        for optimizer in (mine, on_matrices, on_rest):
            optimizer.step()
    want = {name: weight.detach() for name, weight in theirs.items()} | {"experts.up": torch.stack(slices).detach()}
    before = dict(Model().named_parameters())
    for name, weight in model.named_parameters():
        moved = (want[name] - before[name]).norm()
        assert moved > 0.01 and (weight - want[name]).norm() < 1e-3 * moved, name


def test_its_constants_are_those_of_pytorch():
    defaults = {name: each.default for name, each in inspect.signature(torch.optim.Muon).parameters.items()}
    assert (defaults["ns_coefficients"], defaults["ns_steps"]) == (muon.COEFFICIENTS, muon.DEFAULT_NS_STEPS)
    assert defaults["eps"] == muon.EPS
    mine = {name: each.default for name, each in inspect.signature(expertmesh.Muon).parameters.items()}
    assert all(mine[name] == defaults[name] for name in ("lr", "weight_decay", "momentum", "nesterov"))


def test_what_is_a_hidden_matrix():
    model = load_ours("qwen3_moe")
    hidden = muon.hidden_matrices(model)
    for name, weight in model.named_parameters():
        assert (weight in hidden) == name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")), name


@pytest.mark.parametrize(
    ("states", "dtype", "bytes_each"),
    [
        (None, torch.bfloat16, 4),
        ("float32", torch.bfloat16, 10),
        (None, torch.float32, 8),
        ("float32", torch.float32, 8),
    ],
)
def test_what_is_kept_is_said_and_counted(states, dtype, bytes_each, capsys):
    model = Model(dtype)
    optimizer = expertmesh.Muon(model, states=states)
    steps(optimizer, model, range(1))
    kept = everything(model, optimizer)
    hidden = sum(x.nbytes for name, x in kept.items() if name.split("/")[0] in HIDDEN)
    assert hidden - 4 * len(HIDDEN) == bytes_each * sum(p.numel() for n, p in model.named_parameters() if n in HIDDEN)
    each = sum(x.nbytes for x in kept.values()) / sum(p.numel() for p in model.parameters())
    assert optimizer.bytes_per_parameter == pytest.approx(each)
    said = capsys.readouterr().err
    assert f"{each:.2f} bytes a parameter" in said and "Muon steps 3 weights" in said


def test_it_clips_and_changes_nothing_where_a_step_is_refused():
    clipped, scaled = Model(), Model()
    one, other = expertmesh.Muon(clipped, **OPTIONS, max_grad_norm=0.5), expertmesh.Muon(scaled, **OPTIONS)
    steps(one, clipped, range(1))
    scaled.backward(0)
    torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
    other.step()
    assert one.grad_norm > 1
    for name, x in everything(clipped, one).items():
        torch.testing.assert_close(x, everything(scaled, other)[name], rtol=1e-2, atol=1e-5, msg=name)
    before = everything(clipped, one)
    clipped.wide.weight.grad.fill_(float("nan"))
    one.found_inf = torch.ones(())
    one.step()
    assert_same(everything(clipped, one), before)


@pytest.mark.parametrize("states", [None, "float32"])
@pytest.mark.parametrize("through", ["a state dict", "a pickle", "a checkpoint"])
def test_resumed_equals_uninterrupted_bit_for_bit(states, through, tmp_path):
    model = Model(torch.bfloat16)
    optimizer = expertmesh.Muon(model, **OPTIONS, states=states, max_grad_norm=3.0)
    steps(optimizer, model, range(2))
    if through == "a pickle":
        other_model, other = copy.deepcopy((model, optimizer))
    else:
        other_model = copy.deepcopy(model)
        other = expertmesh.Muon(other_model, **OPTIONS, states=states, max_grad_norm=3.0)
    if through == "a state dict":
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    elif through == "a checkpoint":
        write_optimizer(tmp_path, *state_of(model, optimizer))
        load_optimizer(tmp_path, other_model, other)
    steps(optimizer, model, range(2, 4))
    steps(other, other_model, range(2, 4))
    assert_same(everything(model, optimizer), everything(other_model, other))


def test_other_states_can_go_on(tmp_path):
    model = Model(torch.bfloat16)
    narrow = expertmesh.Muon(model, **OPTIONS)
    steps(narrow, model, range(2))
    wide = expertmesh.Muon(model, **OPTIONS, states="float32")
    wide.load_state_dict(narrow.state_dict())
    wide.found_inf = torch.ones(())  # only what is loaded is brought into form
    model.backward(2)
    wide.step()
    for name, weight in model.named_parameters():
        if name in HIDDEN:
            state = wide.state[weight]
            assert torch.equal(state["momentum_buffer"], narrow.state[weight]["momentum_buffer"].float())
            assert torch.equal(state["master"], weight.float())


def test_what_is_refused(tmp_path):
    model = Model()
    for options, message in (
        ({"states": "8bit"}, "does not support states"),
        ({"adjust_lr_fn": "mine"}, "match_rms_adamw, original"),
    ):
        with pytest.raises(ValueError, match=message):
            expertmesh.Muon(model, **options)
    with pytest.raises(ValueError, match="no matrix to train"):
        expertmesh.Muon(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="to an expertmesh.AdamW, not to Muon"):
        expertmesh.GradientRelease(expertmesh.Muon(model))
    model.peft_config = {}
    with pytest.raises(ValueError, match="factors of adapters"):
        expertmesh.Muon(model)
    del model.peft_config
    groups = [group["params"] for group in expertmesh.Muon(model).param_groups]
    makers = [expertmesh.Muon, lambda _: expertmesh.AdamW([{"params": group} for group in groups])]
    for of, to in (makers, makers[::-1]):
        first, second = of(model), to(model)
        steps(first, model, range(1))
        write_optimizer(tmp_path, *state_of(model, first))
        load_optimizer(tmp_path, model, second)
        model.backward(1)
        with pytest.raises(ValueError, match="another optimizer's"):
            second.step()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        expertmesh.Muon(model).load_state_dict(expertmesh.AdamW(model.parameters()).state_dict())
    for of, to in (makers, makers[::-1]):
        first, second = of(model), to(model)
        steps(first, model, range(1))
        second.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match="another optimizer's"):
            second.step()


# --- ranks


def layouts(rank: int, folder: str) -> None:
    """Steps of shards equal those of one process, and their checkpoint goes on in one process."""
    mesh, both = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    alone, sharded, cut = Model(), Model(), Model()
    fully_shard(sharded, mesh=mesh)  # 7 rows on two ranks: not all alike
    for module_name, module in cut.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            is_cut = module_name in ("tall", "experts") and weight.ndim > 1  # across rows, as by tensor parallelism
            placements = [Shard(0), Shard(weight.ndim - 1 if is_cut else 0)]
            laid_out = distribute_tensor(weight.detach(), both, placements)
            module.register_parameter(name, nn.Parameter(laid_out))
    optimizers = [expertmesh.Muon(model, **OPTIONS, max_grad_norm=3.0) for model in (alone, sharded, cut)]
    for optimizer, model in zip(optimizers, (alone, sharded, cut), strict=True):
        steps(optimizer, model, range(3))
    want = everything(alone, optimizers[0])
    for optimizer, model in zip(optimizers[1:], (sharded, cut), strict=True):
        for name, x in everything(model, optimizer).items():
            torch.testing.assert_close(x, want[name], rtol=1e-5, atol=1e-6, msg=name)
    write_optimizer(Path(folder), *state_of(sharded, optimizers[1]))
    ranks.barrier()  # rank 0 writes the last file
    again = Model()
    with torch.no_grad():
        for weight, shard in zip(again.parameters(), sharded.parameters(), strict=True):
            weight.copy_(whole(shard))
    other = expertmesh.Muon(again, **OPTIONS, max_grad_norm=3.0)
    load_optimizer(Path(folder), again, other)
    assert_same(everything(again, other), everything(sharded, optimizers[1]))
    steps(other, again, range(3, 5))
    steps(optimizers[1], sharded, range(3, 5))
    for name, x in everything(sharded, optimizers[1]).items():
        torch.testing.assert_close(x, everything(again, other)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_two_ranks_step_as_one_and_checkpoints_move(tmp_path):
    on_ranks(2, layouts, str(tmp_path))


# --- runs


def test_a_run_trains_by_muon(tmp_path):
    config = load_config(None, tiny_run(tmp_path, train__optim="muon", train__learning_rate=1e-2))
    assert isinstance(build(config).create_optimizer(), expertmesh.Muon)
    result = run(config)
    assert result.exit_code == 0 and result.metrics["eval_loss"] < 8.0


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    options = {"optim_args": "matrices=muon,states=float32", "weight_decay": 0.1}
    whole_run, again = trainer(tmp_path / "a", **options), trainer(tmp_path / "b", **options)
    whole_run.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert isinstance(whole_run._torch_optimizer, expertmesh.Muon)
    assert [group["weight_decay"] for group in whole_run._torch_optimizer.param_groups] == [0.1, 0.1, 0.0]
    for (name, one), other in zip(whole_run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_words_that_trainers_do_not_know_are_an_error(tmp_path):
    for options, message in (
        ({"optim_args": "matrices=shampoo"}, "matrices= must be muon"),
        ({"optim": "sgd", "optim_args": "matrices=muon"}, "matrices= works with expertmesh's AdamW"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options).create_optimizer()


@pytest.mark.parametrize(
    "keys", [["lora={}"], ["train.optim_states=8bit"], ["train.gradient_release=running"]], ids=lambda keys: keys[0]
)
def test_what_it_cannot_be_combined_with_is_an_error(keys):
    with pytest.raises(ConfigError, match="train.optim"):
        load_config(None, ["train.optim=muon", *keys])
