"""AdamW is PyTorch's in everything but the way it is computed: state, checkpoints, clipping, closures, Trainers."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import default_data_collator

import expertmesh
from expertmesh.bench.tiny import tiny_model
from expertmesh.checkpoint.optimizer import load_optimizer, state_of, write_optimizer
from expertmesh.memory import adamw
from expertmesh.parallel.clip import grad_norm
from tests.kernels.compare import on_triton

STOCK = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
BOTH = pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Model(torch.nn.Module):
    """Weights of all kinds: a matrix, one in another order of memory, a scalar, none, a frozen and an unused one."""

    laid_out_alike = True  # gradients are in the order of their weights

    def __init__(self, dtype=torch.float32):
        super().__init__()
        shapes = {"matrix": (5, 7), "vector": (33,), "scalar": (), "empty": (0, 3), "unused": (4,), "frozen": (3,)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape).to(dtype)))
        self.turned = torch.nn.Parameter(torch.randn(4, 6).to(dtype).T)
        self.frozen.requires_grad_(False)

    def backward(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name not in ("unused", "frozen"):
                grad = (torch.randn(weight.shape, generator=generator) * scale).to(weight.dtype)
                # PyTorch's fused AdamW on CPUs takes memory as it comes
                weight.grad = torch.empty_like(weight).copy_(grad) if self.laid_out_alike else grad


def pair(**options) -> tuple[Model, Model]:
    ours = Model(**options)
    return ours, copy.deepcopy(ours)


def groups(model: torch.nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


def assert_close(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=name)


def run(optimizer, model, steps: range, kernels: bool = False, scheduler=None) -> None:
    for step in steps:
        model.backward(step)
        if kernels:
            with on_triton():
                optimizer.step()
        else:
            optimizer.step()
        if scheduler:
            scheduler.step()


@BOTH
@pytest.mark.parametrize(
    "changes", [{}, {"maximize": True}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"weight_decay": 0.0}]
)
def test_steps_with_groups_and_a_schedule_equal_pytorchs(kernels, changes):
    ours, theirs = pair()
    ours.laid_out_alike = theirs.laid_out_alike = False
    for cls, model, by_kernels in ((expertmesh.AdamW, ours, kernels), (torch.optim.AdamW, theirs, False)):
        optimizer = cls(groups(model), **OPTIONS | changes)
        run(optimizer, model, range(4), by_kernels, LambdaLR(optimizer, lambda step: 1 / (1 + step)))
        assert model.unused not in optimizer.state and model.frozen not in optimizer.state
    assert_close(ours, theirs)


@BOTH
def test_the_learning_rate_may_be_a_tensor(kernels):
    ours, theirs = pair()
    lr = torch.tensor(1e-2)
    mine = expertmesh.AdamW(ours.parameters(), lr=lr)
    run(mine, ours, range(2), kernels)
    lr.fill_(1e-3)
    run(mine, ours, range(2, 4), kernels)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    run(other, theirs, range(2))
    other.param_groups[0]["lr"] = 1e-3
    run(other, theirs, range(2, 4))
    assert_close(ours, theirs)


@pytest.mark.parametrize("to_ours", [True, False], ids=["to ours", "to PyTorch's"])
@pytest.mark.parametrize("kind", STOCK)
def test_a_state_dict_moves_between_ours_and_pytorchs(kind, to_ours):
    """And who takes it goes on as who saved it."""
    first, second = pair()
    stock = lambda model: torch.optim.AdamW(groups(model), **OPTIONS, **STOCK[kind])  # noqa: E731
    mine = lambda model: expertmesh.AdamW(groups(model), **OPTIONS, max_grad_norm=1e9)  # noqa: E731
    saved, loaded = (stock(first), mine(second)) if to_ours else (mine(first), stock(second))
    run(saved, first, range(3))
    second.load_state_dict(first.state_dict())
    state = pickle.loads(pickle.dumps(saved.state_dict()))
    loaded.load_state_dict(state)
    assert state.keys() == loaded.state_dict().keys()
    for one, other in zip(saved.param_groups, loaded.param_groups, strict=True):
        assert one.keys() == other.keys()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        for key, value in saved.state.get(a, {}).items():
            assert torch.equal(value, loaded.state[b][key]), key
    if to_ours:
        assert loaded.max_grad_norm == 1e9 and all(g["fused"] and not g["foreach"] for g in loaded.param_groups)
    run(saved, first, range(3, 5))
    run(loaded, second, range(3, 5))
    assert_close(first, second)


@BOTH
@pytest.mark.parametrize("through", ["a state dict", "a pickle"])
def test_resumed_equals_uninterrupted_bit_for_bit(through, kernels):
    model = Model()
    optimizer = expertmesh.AdamW(model.parameters(), **OPTIONS, max_grad_norm=3.0)
    run(optimizer, model, range(3), kernels)
    if through == "a pickle":
        other_model, other = copy.deepcopy((model, optimizer))
        assert other.max_grad_norm == 3.0
    else:
        other_model = copy.deepcopy(model)
        other = expertmesh.AdamW(other_model.parameters(), **OPTIONS, max_grad_norm=3.0)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for each, weights in ((optimizer, model), (other, other_model)):
        run(each, weights, range(3, 6), kernels)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


@pytest.mark.parametrize("loads_ours", [True, False], ids=["into ours", "into PyTorch's"])
def test_sharded_checkpoints_move_too(tmp_path, loads_ours):
    first, second = pair()
    mine = lambda model: expertmesh.AdamW(groups(model), **OPTIONS)  # noqa: E731
    stock = lambda model: torch.optim.AdamW(groups(model), **OPTIONS)  # noqa: E731
    saved, loaded = (stock(first), mine(second)) if loads_ours else (mine(first), stock(second))
    run(saved, first, range(3))
    write_optimizer(tmp_path, *state_of(first, saved))
    second.load_state_dict(first.state_dict())
    load_optimizer(tmp_path, second, loaded)
    assert all(bool(group["fused"]) == loads_ours for group in loaded.param_groups), "its own way, not the checkpoint's"
    run(saved, first, range(3, 5))
    run(loaded, second, range(3, 5))
    assert_close(first, second)


@BOTH
@pytest.mark.parametrize("max_norm", [0.1, 1e4], ids=["clips", "leaves"])
@pytest.mark.parametrize("told", [False, True], ids=["measures", "is told"])
def test_clipping_within_the_step_equals_pytorchs_before_it(max_norm, told, kernels):
    ours, theirs = pair()
    mine = expertmesh.AdamW(ours.parameters(), **OPTIONS, max_grad_norm=None if told else max_norm)
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    for step in range(3):
        ours.backward(step, 10.0**step)
        theirs.backward(step, 10.0**step)
        before = ours.matrix.grad.clone()
        if told:
            mine.clip_next(grad_norm(ours.parameters()), max_norm)
        run_step = mine.step
        if kernels:
            with on_triton():
                run_step()
        else:
            run_step()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        other.step()
        torch.testing.assert_close(mine.grad_norm, norm)
        assert torch.equal(ours.matrix.grad, before), "gradients stay as they are"
    assert_close(ours, theirs)


def test_a_norm_that_is_told_holds_for_one_step_and_the_smaller_bound_wins(monkeypatch):
    model = Model()
    optimizer = expertmesh.AdamW(model.parameters(), max_grad_norm=2.0)
    scales = []
    monkeypatch.setattr(adamw, "adamw_", lambda updates, scale, found: scales.append(float(scale)))
    for told in ((torch.tensor(8.0), 4.0), (torch.tensor(8.0), 1.0), (torch.tensor(8.0), float("inf")), None):
        model.backward(0)
        if told:
            optimizer.clip_next(*told)
        optimizer.step()
    own = 2.0 / float(grad_norm(model.parameters()))
    assert scales == pytest.approx([0.25, 0.125, 0.25, own], rel=1e-5)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_a_loss_scaler_is_heeded(unscale, max_norm):
    """Like PyTorch's fused AdamW; with our clipping the norm is that of the gradients without the loss' scale."""
    ours, theirs = pair()
    mine = expertmesh.AdamW(ours.parameters(), **OPTIONS, max_grad_norm=max_norm)
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step in range(5):
        for model, optimizer, scaler in ((ours, mine, scalers[0]), (theirs, other, scalers[1])):
            factor = float(scaler.scale(torch.ones(())))
            model.backward(step, factor)
            if step == 3:
                model.matrix.grad[0, 0] = float("inf")
            if unscale or (optimizer is other and max_norm):
                scaler.unscale_(optimizer)
            if optimizer is other and max_norm:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
    assert mine.state[ours.matrix]["step"] == other.state[theirs.matrix]["step"] == 4
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_on_a_cpu_are_pytorchs_bit_for_bit(dtype):
    ours, theirs = pair(dtype=dtype)
    ours.turned.data, theirs.turned.data = ours.turned.data.contiguous(), theirs.turned.data.contiguous()
    run(expertmesh.AdamW(ours.parameters(), **OPTIONS), ours, range(3))
    run(torch.optim.AdamW(theirs.parameters(), **OPTIONS, fused=True), theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = expertmesh.AdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3 and (weight < 1).all()
    assert expertmesh.AdamW([{"params": []}, {"params": [weight]}]).step() is None


def test_what_is_not_supported_is_an_error():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="greater than 0"):
        expertmesh.AdamW([weight], max_grad_norm=0.0)
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        expertmesh.AdamW([weight], differentiable=True)
    loaded = expertmesh.AdamW([weight])
    loaded.load_state_dict(torch.optim.AdamW([weight], amsgrad=True).state_dict())
    weight.grad = torch.ones(3)
    for optimizer in (loaded, expertmesh.AdamW([{"params": [weight], "amsgrad": True}])):
        with pytest.raises(ValueError, match="amsgrad=True"):
            optimizer.step()
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        expertmesh.AdamW([weight]).step()


# --- Trainers


def trainer(folder, cls=expertmesh.Trainer, optimizer=None, **settings):
    ids = torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    shape = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    args = transformers.TrainingArguments(str(folder), **quiet | shape | settings)
    options = {"args": args, "train_dataset": rows, "optimizer_cls_and_kwargs": optimizer}
    return cls(tiny_model("qwen3_moe"), **options, data_collator=default_data_collator)


def logged(run) -> list[float]:
    run.train()
    return [number for log in run.state.log_history if "grad_norm" in log for number in (log["loss"], log["grad_norm"])]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_our_trainer_takes_it_and_its_losses_are_the_stock_ones(tmp_path, max_grad_norm, accumulate, monkeypatch):
    settings = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulate}
    want = logged(trainer(tmp_path / "stock", transformers.Trainer, **settings))
    run = trainer(tmp_path / "ours", **settings)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)  # the step clips
    assert logged(run) == pytest.approx(want, rel=2e-5)
    assert type(run._torch_optimizer) is expertmesh.AdamW and run._torch_optimizer.grad_norm > 0.5


def test_whoever_says_otherwise_gets_another_optimizer(tmp_path, capsys):
    for optim, cls in (("adamw_torch", expertmesh.AdamW), ("adafactor", transformers.Adafactor)):
        run = trainer(tmp_path, optim=optim)
        assert type(run.create_optimizer()) is cls
    assert capsys.readouterr().err.count("expertmesh's AdamW") == 1
    run = trainer(tmp_path, optimizer=(torch.optim.AdamW, {"lr": 1e-2}), max_grad_norm=0.5)
    stock = trainer(tmp_path, transformers.Trainer, (torch.optim.AdamW, {"lr": 1e-2}), max_grad_norm=0.5)
    assert type(run.create_optimizer()) is torch.optim.AdamW
    assert logged(run) == pytest.approx(logged(stock), rel=2e-5)


def test_a_word_chooses_its_states(tmp_path):
    run = trainer(tmp_path, optim_args="states=8bit")
    assert logged(run) == pytest.approx(logged(trainer(tmp_path)), rel=0.05)
    assert run._torch_optimizer.states == "8bit" and not run._torch_optimizer.offload
    run = trainer(tmp_path, optim_args="states=8bit,offload=true")
    assert run.create_optimizer().offload
    with pytest.raises(ValueError, match="states= works with expertmesh's AdamW, not Adafactor"):
        trainer(tmp_path, optim="adafactor", optim_args="states=8bit").create_optimizer()


def test_the_stock_trainer_takes_it_with_its_own_clipping_or_ours(tmp_path):
    want = logged(trainer(tmp_path, transformers.Trainer, max_grad_norm=0.5))
    ours = expertmesh.AdamW, {"lr": 1e-2}
    assert logged(trainer(tmp_path, transformers.Trainer, ours, max_grad_norm=0.5)) == pytest.approx(want, rel=2e-5)
    folded = expertmesh.AdamW, {"lr": 1e-2, "max_grad_norm": 0.5}
    for cls in (transformers.Trainer, expertmesh.Trainer):
        assert logged(trainer(tmp_path, cls, folded, max_grad_norm=0)) == pytest.approx(want, rel=2e-5)


def test_float16s_loss_scaler_keeps_clipping_to_itself(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_grad_norm=0.5)
    run.create_optimizer()
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    asked = []
    run.accelerator.clip_grad_norm_ = lambda _, norm: asked.append(norm) or torch.tensor(3.0)
    assert run._clip_grad_norm(run.model) == 3.0 and asked == [0.5]
    assert run._torch_optimizer._clip is None
