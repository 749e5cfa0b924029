"""AdamW's low-memory states: what they cost, that they learn as float32 ones do, and that they resume and move."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import expertmesh
from expertmesh.checkpoint.optimizer import load_optimizer, state_of, write_optimizer
from expertmesh.kernels.block_quant import dequantize, join
from expertmesh.memory import states as low_memory
from expertmesh.parallel import ranks
from expertmesh.parallel.clip import local_shard
from tests.distributed.ranks import on_ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
STATES = pytest.mark.parametrize("states", low_memory.STATES)


class Model(nn.Module):
    """A matrix with rows of three blocks, a stack of experts, a norm, and rows that no block divides."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (16, 768), "experts": (4, 32, 64), "norm": (64,), "odd": (64, 70)}
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))

    def backward(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            grad = (torch.randn(weight.shape, generator=generator) + 0.5).to(weight.dtype)
            parts = [] if not hasattr(weight, "placements") else [weight.device_mesh, weight.placements]
            weight.grad = distribute_tensor(grad, *parts, src_data_rank=None) if parts else grad


def run(optimizer, model: Model, steps: range) -> None:
    for step in steps:
        model.backward(step)
        optimizer.step()


def everything(model, optimizer) -> list[torch.Tensor]:
    tensors = [*model.parameters()]
    tensors += [x for p in model.parameters() for _, x in sorted(optimizer.state[p].items()) if torch.is_tensor(x)]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def floats(parameter, state) -> dict[str, torch.Tensor]:
    """Moments and the weight as it is known best, whatever the form."""
    found = {"weight": parameter.detach().float()}
    if "remainder" in state:
        found["weight"] = join(parameter.detach(), state["remainder"])
    if "master" in state:
        found["weight"] = state["master"]
    for key in low_memory.MOMENTS:
        found[key] = (
            state[key].float()
            if key in state
            else dequantize(state[f"{key}_8bit"], state[f"{key}_scale"], key == "exp_avg")
        )
    return found


@pytest.mark.parametrize(
    ("states", "dtype", "bytes_each"),
    [(None, "bfloat16", 6), ("8bit", "bfloat16", 4.03), ("24bit", "bfloat16", 5.03), ("float32", "bfloat16", 14)]
    + [(None, "float32", 12), ("8bit", "float32", 6.03), ("float32", "float32", 12)],
)
def test_what_is_kept_is_said_and_counted(states, dtype, bytes_each, capsys):
    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(1024, 2048, dtype=getattr(torch, dtype)))
    form = low_memory.form_of(weight, states)
    assert low_memory.bytes_kept(weight, form) / weight.numel() == pytest.approx(bytes_each, abs=0.005)
    model = Model(getattr(torch, dtype))
    optimizer = expertmesh.AdamW(model.parameters(), states=states)
    run(optimizer, model, range(1))
    counted = sum(x.nbytes for x in everything(model, optimizer))
    assert sum(low_memory.bytes_kept(p, low_memory.form_of(p, states)) for p in model.parameters()) == counted
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "AdamW keeps" in line)
    numbers = sum(p.numel() for p in model.parameters())
    assert f"{counted / numbers:.2f} bytes a parameter" in line and (states is None or states in line)


def test_what_is_small_or_odd_keeps_float32_states():
    model = Model()
    optimizer = expertmesh.AdamW(model.parameters(), **OPTIONS, states="8bit")
    run(optimizer, model, range(1))
    for weight in (model.norm, model.odd):
        assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
        assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.matrix]["exp_avg_scale"].shape == (16, 3)
    assert optimizer.state[model.experts]["exp_avg_sq_scale"].shape == (4, 32, 1)


@pytest.mark.parametrize(
    ("states", "dtype"),
    [*((states, torch.bfloat16) for states in low_memory.STATES), ("8bit", torch.float32), ("float32", torch.float32)],
    ids=str,
)
def test_a_few_steps_are_near_those_of_float32(states, dtype):
    model = Model(dtype)
    exact = Model(torch.float32)
    with torch.no_grad():
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            one.copy_(other)
    before = copy.deepcopy(exact)
    mine, other = (
        expertmesh.AdamW(model.parameters(), **OPTIONS, states=states, max_grad_norm=3.0),
        expertmesh.AdamW(exact.parameters(), **OPTIONS, max_grad_norm=3.0),
    )
    for step in range(10):
        exact.backward(step)
        model.backward(step)
        for one, two in zip(exact.parameters(), model.parameters(), strict=True):
            one.grad.copy_(two.grad)
        mine.step()
        other.step()
    for name, weight in model.named_parameters():
        got, want = (
            floats(weight, mine.state[weight]),
            floats(exact.get_parameter(name), other.state[exact.get_parameter(name)]),
        )
        moved = want["weight"] - before.get_parameter(name)
        rounding = 2**-7 * want["weight"].norm() if states == "8bit" and dtype == torch.bfloat16 else 0
        bound = 0.05 if states != "float32" else 1e-4
        assert (got["weight"] - want["weight"]).norm() < bound * moved.norm() + rounding, name
        for key in low_memory.MOMENTS:
            assert (got[key] - want[key]).norm() < (0.1 if states != "float32" else 1e-5) * want[key].norm(), (
                name,
                key,
            )


def losses(states: str | None, dtype: torch.dtype, steps: int = 150) -> float:
    """The mean loss of the last steps of a small network that learns another one."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    optimizer = expertmesh.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0, states=states, max_grad_norm=1.0)
    last = []
    for step in range(steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        y = teacher(x).detach()
        loss = (
            (torch.func.functional_call(model, {n: p.float() for n, p in model.named_parameters()}, x) - y)
            .square()
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last.append(float(loss.detach()))
    return sum(last[-25:]) / 25


def test_they_learn_what_float32_masters_learn(monkeypatch):
    """Where bfloat16 alone stops learning. All but the biases are in 8 bits."""
    monkeypatch.setattr(low_memory, "SMALL", 256)
    masters = losses("float32", torch.bfloat16)
    assert losses(None, torch.bfloat16) > 1.1 * masters
    assert losses("24bit", torch.bfloat16) == pytest.approx(masters, rel=0.01)
    assert losses("8bit", torch.bfloat16) == pytest.approx(masters, rel=0.03)


@STATES
@pytest.mark.parametrize("through", ["a state dict", "a pickle", "a checkpoint"])
def test_resumed_equals_uninterrupted_bit_for_bit(states, through, tmp_path):
    make = lambda model: expertmesh.AdamW(model.parameters(), **OPTIONS, states=states, max_grad_norm=3.0)  # noqa: E731
    model = Model()
    optimizer = make(model)
    run(optimizer, model, range(2))
    if through == "a pickle":
        other_model, other = copy.deepcopy((model, optimizer))
        assert other.states == states
    else:
        other_model = copy.deepcopy(model)
        other = make(other_model)
        if through == "a state dict":
            other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        else:
            write_optimizer(tmp_path, *state_of(model, optimizer))
            load_optimizer(tmp_path, other_model, other)
    run(optimizer, model, range(2, 4))
    run(other, other_model, range(2, 4))
    assert equal(everything(model, optimizer), everything(other_model, other))


@pytest.mark.parametrize("to", [None, *low_memory.STATES])
@pytest.mark.parametrize("of", ["PyTorch's", None, *low_memory.STATES])
def test_every_state_can_go_on_as_every_other(of, to):
    model = Model()
    make = {"PyTorch's": lambda: torch.optim.AdamW(model.parameters(), **OPTIONS)}
    first = make.get(of, lambda: expertmesh.AdamW(model.parameters(), **OPTIONS, states=of))()
    run(first, model, range(2))
    known = {p: floats(p, first.state[p]) for p in model.parameters()}
    weights = [p.detach().clone() for p in model.parameters()]
    second = expertmesh.AdamW(model.parameters(), **OPTIONS, states=to)
    second.load_state_dict(first.state_dict())
    second.found_inf = torch.ones(())  # only what is loaded is brought into form
    model.backward(2)
    second.step()
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        state = second.state[parameter]
        assert torch.equal(parameter, weight) and state["step"] == 2
        assert low_memory.has_form(parameter, state, low_memory.form_of(parameter, to))
        got, want = floats(parameter, state), known[parameter]
        bound = 3e-2 if to in ("8bit", "24bit") else 2e-3 if to is None else 0  # codes, bfloat16, float32
        for key in low_memory.MOMENTS:
            assert (got[key] - want[key]).norm() <= bound * want[key].norm(), key
        if to == of:
            assert all(torch.equal(got[key], want[key]) for key in want)
        if to in ("24bit", "float32"):
            torch.testing.assert_close(got["weight"], want["weight"], rtol=2**-15, atol=0)
    del second.found_inf
    run(second, model, range(3, 4))
    plain = second.state_dict()
    if to in (None, "float32"):
        torch.optim.AdamW(model.parameters(), **OPTIONS).load_state_dict(plain)
    is_plain = [state.keys() == {"step", *low_memory.MOMENTS} for state in plain["state"].values()]
    assert all(is_plain) == (to is None), "what PyTorch's AdamW reads"


def test_moments_are_in_the_dtype_that_weights_have_at_the_step():
    """Of a model that is cast after its optimizer was made, and of a state that was another dtype's."""
    model = Model(torch.float32)
    first = expertmesh.AdamW(model.parameters(), **OPTIONS)
    run(first, model, range(2))
    saved = copy.deepcopy(first.state_dict())
    second = expertmesh.AdamW(model.parameters(), **OPTIONS)
    model.bfloat16()
    second.load_state_dict(saved)
    run(second, model, range(2, 3))
    for parameter in model.parameters():
        state = second.state[parameter]
        assert {state[key].dtype for key in low_memory.MOMENTS} == {torch.bfloat16} and state["step"] == 3


def test_what_is_refused():
    half, single = (nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float16, torch.float32))
    for weight, states, message in (
        (single, "4bit", "'8bit', '24bit', 'float32'"),
        (half, "8bit", "not torch.float16"),
        (single, "24bit", "extends bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            expertmesh.AdamW([weight], states=states)


@pytest.mark.parametrize("states", [None, *low_memory.STATES])
def test_states_on_the_host_step_save_and_load_as_others(states, tmp_path, monkeypatch):
    monkeypatch.setattr(low_memory, "LARGE", 2**13)  # the matrix and the experts

    def make(offload: bool, model: Model) -> expertmesh.AdamW:
        return expertmesh.AdamW(model.parameters(), **OPTIONS, states=states, offload=offload)

    models = [Model() for _ in range(4)]
    here, away, loaded, resumed = (make(number > 0, model) for number, model in enumerate(models))
    run(here, models[0], range(3))
    run(away, models[1], range(3))
    assert equal(everything(models[0], here), everything(models[1], away))
    for model in models[2:]:
        model.load_state_dict(models[0].state_dict())
    loaded.load_state_dict(copy.deepcopy(here.state_dict()))
    write_optimizer(tmp_path, *state_of(models[1], away))
    load_optimizer(tmp_path, models[3], resumed)
    here.load_state_dict(copy.deepcopy(away.state_dict()))
    for optimizer, model in zip((here, away, loaded, resumed), models, strict=True):
        run(optimizer, model, range(3, 5))
        assert equal(everything(model, optimizer), everything(models[0], here))


@pytest.mark.parametrize("states", [None, "8bit", "24bit"])
def test_states_of_large_weights_lie_on_the_host_wherever_the_weights_do(states, monkeypatch):
    monkeypatch.setattr(low_memory, "LARGE", 2**13)
    model = Model().to("meta")
    optimizer = expertmesh.AdamW(model.parameters(), states=states, offload=True)
    for name in ("matrix", "experts", "norm")[: None if states is None else 2]:
        parameter = model.get_parameter(name)
        state = {key: x for key, x in optimizer.prepare(parameter).items() if torch.is_tensor(x)}
        assert state.pop("step").is_meta and state
        place = torch.device(optimizer.form(parameter).place["device"])
        assert place.type == ("meta" if name == "norm" else "cpu") and {x.device for x in state.values()} == {place}
    assert pickle.loads(pickle.dumps(optimizer)).offload


# --- ranks


def layouts(rank: int, folder: str) -> None:
    """Steps sharded by rows equal those of one process, and their checkpoint goes on in other layouts."""
    mesh = init_device_mesh("cpu", (2,))
    for states in low_memory.STATES:
        make = lambda model, states=states: expertmesh.AdamW(model.parameters(), **OPTIONS, states=states)  # noqa: E731
        alone, sharded, columns = Model(), Model(), Model()
        fully_shard(sharded, mesh=mesh)
        for name, weight in columns.named_parameters():
            dim = 0 if name in ("norm", "odd") else weight.ndim - 1
            columns.register_parameter(name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(dim)])))
        one, two, three = map(make, (alone, sharded, columns))
        run(one, alone, range(3))
        run(two, sharded, range(3))
        assert equal(everything(alone, one), everything(sharded, two))
        with pytest.raises(ValueError, match="GPU that is alone"):
            expertmesh.AdamW(sharded.parameters(), offload=True)
        place = Path(folder, states)
        place.mkdir(exist_ok=True)
        write_optimizer(place, *state_of(sharded, two))
        ranks.barrier()  # rank 0 writes the last file
        again = Model()
        alone_again = make(again)
        again.load_state_dict(alone.state_dict())
        load_optimizer(place, again, alone_again)
        run(alone_again, again, range(3, 5))
        run(one, alone, range(3, 5))
        assert equal(everything(alone, one), everything(again, alone_again))
        # rows of 768 are 3 blocks of 256; half a row is 3 blocks of 128: codes are made anew
        with torch.no_grad():
            for weight, whole in zip(columns.parameters(), sharded.parameters(), strict=True):
                weight.copy_(distribute_tensor(whole.full_tensor(), mesh, weight.placements))
        load_optimizer(place, columns, three)
        run(three, columns, range(3, 5))
        run(two, sharded, range(3, 5))
        for got, want in zip(columns.parameters(), sharded.parameters(), strict=True):
            got, want = got.full_tensor().float(), want.full_tensor().float()
            torch.testing.assert_close(got, want, rtol=2**-6, atol=3e-3)
        state = three.state[columns.matrix]
        if states != "float32":
            assert state["exp_avg_scale"].shape == (16, 6) and local_shard(state["exp_avg_scale"]).shape == (16, 3)


def test_two_ranks_step_as_one_and_checkpoints_move(tmp_path):
    on_ranks(2, layouts, str(tmp_path))
