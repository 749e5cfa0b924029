"""What ranks do in the parity tests, and the same on one process with stock Transformers."""

import contextlib
import functools
import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import expertmesh
from expertmesh import backends
from expertmesh.bench.tiny import tiny_config
from expertmesh.kernels.grouping import combine
from expertmesh.memory import release as release_module
from expertmesh.moe import experts, gather
from expertmesh.moe.experts import TRANSPORTS, Dispatch
from expertmesh.moe.gather import Gather, Mailboxes
from expertmesh.parallel.clip import clip_grad_norm
from expertmesh.parallel.setup import DistributedSetup
from expertmesh.records import Call, in_call
from expertmesh.timeouts import RanksError
from expertmesh.train.balance import BalanceRouters
from expertmesh.train.graphed import WARM_UP, GraphedStep
from expertmesh.train.routing import RouterLoad

LENGTHS = (11, 7, 13, 5)  # tokens per data-parallel rank: uneven, and no multiple of anything


@dataclass(frozen=True)
class Case:
    """One run of a layout. force: the expert ids that every token gets, or None for the router's own."""

    setup: dict[str, Any]
    recompute: Any = False
    force: tuple[int, ...] | None = None
    fused: bool = True

    def __str__(self) -> str:
        sizes = " ".join(f"{k.removesuffix('_size')}{v}" for k, v in self.setup.items())
        return f"{sizes or 'fsdp'}{' recompute' * bool(self.recompute)}{f' force {self.force}' if self.force else ''}"


def batches(dp_size: int) -> list[torch.Tensor]:
    """One batch [2, S] for each data-parallel rank, S different for each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (2, LENGTHS[r % 4]), generator=generator) for r in range(dp_size)]


def num_items(dp_size: int) -> int:
    """Labelled tokens of all batches."""
    return sum(2 * (b.shape[1] - 1) for b in batches(dp_size))


def force_choices(model: Any, ids: tuple[int, ...] | None) -> None:
    """Let every token choose these experts, with the router's weights: the largest whole, the second halved, …

    Halved, so that they do not sum to 1 and their gradients do not vanish when all choices are one expert.
    """
    if ids is None:
        return
    routers = [m for name, m in model.named_modules() if name.endswith(("mlp.gate", "mlp.router", "mixer.gate"))]
    routers = [m for m in routers if "Router" in type(m).__name__]
    assert routers

    def forced(_: Any, __: Any, out: tuple) -> tuple:
        logits, weights, chosen = out
        weights = weights.sort(-1, descending=True).values * 0.5 ** torch.arange(len(ids), device=weights.device)
        return logits, weights, torch.tensor(ids).to(chosen).expand_as(chosen).contiguous()

    for router in routers:
        router.register_forward_hook(forced)


def reference(model: Any, dp_size: int, force: tuple[int, ...] | None) -> dict[str, Any]:
    """Loss and gradients of all batches on one process."""
    force_choices(model.train(), force)
    model.zero_grad()
    loss = 0.0
    for batch in batches(dp_size):
        batch = batch.to(model.device)
        part = model(input_ids=batch, labels=batch, num_items_in_batch=num_items(dp_size), use_cache=False).loss
        part.backward()
        loss += part.item()
    return {"loss": loss, "grads": {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}}


def load(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, DistributedSetup]:
    """The model laid out as the case says."""
    setup = DistributedSetup(**case.setup, activation_checkpointing=case.recompute)
    model = expertmesh.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_setup=setup, fused=case.fused
    )
    force_choices(model.train(), case.force)
    return model, setup


def full(x: torch.Tensor) -> torch.Tensor:
    """A whole tensor from its shards, on the CPU; every rank must ask."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()


def loss_of(model: Any, setup: DistributedSetup, rank: int, batch: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's part of the loss, times the data-parallel ranks that FSDP divides gradients by."""
    if batch is None:
        batch = batches(setup.dp_size)[rank // setup.tp_size].to(model.device)
    items = num_items(setup.dp_size)
    loss = model(input_ids=batch, labels=batch, num_items_in_batch=items, use_cache=False).loss
    return loss * setup.dp_size


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor relative to its largest element, and the tensor's name."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    errors = [(float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-8)), n) for n in want]
    bad = [e for e in errors if e[0] != e[0]]
    return max(bad or errors)


def parity(rank: int, folder: Path, cases: list[Case], references: Path) -> list[tuple[str, float, float, str]]:
    """For every case: (name, loss error, worst gradient error, its parameter)."""
    results = []
    if not torch.cuda.is_available():
        open_memory(references)
    for case in cases:
        model, setup = load(folder, case)
        want = torch.load(references / f"{setup.dp_size}-{case.force}.pt")
        loss = loss_of(model, setup, rank)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        grads = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        error, name = worst(grads, want["grads"])
        results.append((str(case), abs(float(mean) - want["loss"]) / want["loss"], error, name))
    return results


def train(model: Any, steps: int, loss_and_backward: Any, clip: Any) -> list[float]:
    """`steps` of AdamW with clipping at a norm that every step exceeds (by ours if clip is None); returns the norms."""
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3}
    if clip is None:
        optimizer: Any = expertmesh.AdamW(model.parameters(), **options, max_grad_norm=0.5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_and_backward()
        norm = None if clip is None else clip(model.parameters(), 0.5)
        optimizer.step()
        norms.append(float(optimizer.grad_norm if norm is None else norm))
    return norms


def trained_reference(model: Any, dp_size: int, steps: int) -> dict[str, Any]:
    """Weights and norms after some steps on one process."""
    norms = train(model, steps, lambda: reference(model, dp_size, None), torch.nn.utils.clip_grad_norm_)
    return {"norms": norms, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def steps(rank: int, folder: Path, cases: list[Case], references: Path, num_steps: int) -> list[tuple]:
    """For every case: (name, worst error of a norm, worst error of a weight, its parameter)."""
    results = []
    for case, clip in itertools.product(cases, (clip_grad_norm, None)):
        model, setup = load(folder, case)
        want = torch.load(references / f"steps-{setup.dp_size}.pt")
        norms = train(model, num_steps, lambda m=model, s=setup: loss_of(m, s, rank).backward(), clip)
        norm_error = max(abs(a - b) / b for a, b in zip(norms, want["norms"], strict=True))
        weights = {n: full(p.detach()) for n, p in model.named_parameters()}
        results.append((f"{case} {clip}", norm_error, *worst(weights, want["weights"])))
    return results


def generate_and_save(rank: int, folder: Path, case: Case, prompts: list[torch.Tensor], out: Path) -> torch.Tensor:
    """What this rank makes of its prompt; then all save together."""
    model, setup = load(folder, case)
    model.eval()
    prompt = prompts[rank // setup.tp_size]
    made = model.generate(prompt, max_new_tokens=4 + rank // setup.tp_size, do_sample=False)
    model.save_pretrained(out)
    return made


def nemo_script(rank: int, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The example of the announcement, with this package's name, two ranks and the CPU's backend."""
    import torch.distributed as dist

    from expertmesh.nemo import NeMoAutoModelForCausalLM, create_distributed_setup_from_config

    dist.init_process_group(backend="gloo")
    dist_setup = create_distributed_setup_from_config(
        {
            "strategy": "fsdp2",
            "ep_size": 2,
        }
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        distributed_setup=dist_setup,
    )
    with torch.no_grad():
        return model(ids).logits


def interleaved(rank: int, folders: list[Path], case: Case, references: list[Path]) -> list[float]:
    """Two models in one process, forward a, forward b, backward a, backward b."""
    models = [load(folder, case) for folder in folders]
    losses = [loss_of(model, setup, rank) for model, setup in models]
    errors = []
    for (model, setup), loss, path in zip(models, losses, references, strict=True):
        loss.backward()
        want = torch.load(path / f"{setup.dp_size}-None.pt")
        errors.append(worst({n: full(p.grad) for n, p in model.named_parameters()}, want["grads"])[0])
    return errors


def adapt(model: Any, rank: int = 0, **targets: list[str]) -> Any:
    """Adapters, drawn anew on every rank."""
    from peft import LoraConfig, inject_adapter_in_model  # other ranks need not load it

    torch.manual_seed(1 + rank)
    return inject_adapter_in_model(LoraConfig(**targets, init_lora_weights=False), model)


def adapters(rank: int, folder: Path, cases: list[tuple[Case, dict[str, list[str]]]]) -> list[Any]:
    """For every case and what is adapted: the adapters' gradients after two microbatches, or what refuses them."""
    results: list[Any] = []
    for case, targets in cases:
        model, setup = load(folder, case)
        try:
            adapt(model, rank, **targets)
            for _ in range(2):
                loss_of(model, setup, rank).backward()
        except ValueError as error:
            results.append(str(error))
        else:
            results.append({n: p.grad / 2 for n, p in model.named_parameters() if "lora" in n})
    return results


def differences(rank: int, folders: list[Path], out: Path) -> dict[str, str]:
    """What a rank says, in each case, where rank 1 does something else than rank 0."""

    def loading(folder: Path, **setup: Any) -> Any:
        return load(folder, Case(setup))[0]

    def training(model: Any, rows: int = 8, **arguments: Any) -> None:
        data = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * rows
        given = {
            "output_dir": str(out),
            "max_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        expertmesh.Trainer(model, TrainingArguments(**(given | arguments)), train_dataset=data).train()

    model = loading(folders[0])
    cases: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: loading(folders[0], dispatch=("all_to_all", "gather")[rank]),
        "rms_norm_eps": lambda: loading(folders[rank]),
        "model.safetensors": lambda: loading(folders[2 * rank]),
        "learning_rate": lambda: training(model, learning_rate=(1e-3, 1e-4)[rank]),
        "max_steps": lambda: training(model, max_steps=1 + rank),
        "seed": lambda: training(model, seed=1 + rank),
        "rows of training data": lambda: training(model, rows=8 + 4 * rank),
        "nothing": lambda: training(model, output_dir=str(out / str(rank)), run_name=str(rank)),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except RanksError as error:
            said[name] = str(error)
    return said


def stops_in_its_data(rank: int, folder: Path, out: Path) -> str:
    """What rank 0 says when rank 1 stands still while it reads the batch of the second step."""
    told, seen = out / "told", []
    model = load(folder, Case({"timeout_minutes": 0.05}))[0]

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        seen.append(rows)
        while rank == 1 and len(seen) > 2 and not told.exists():  # Accelerate reads one ahead
            time.sleep(0.05)
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    data = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 64
    given = {"max_steps": 6, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(out), per_device_train_batch_size=1, **given)
    try:
        expertmesh.Trainer(model, arguments, data_collator=collate, train_dataset=data).train()
    except RuntimeError as error:  # of rank 1 whatever comes once rank 0 has gone
        return str(error)
    finally:
        told.touch()
    return "no error"


def balanced(rank: int, folder: Path, case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each router: how its bias moved, and the rows that its experts got on this rank."""
    model, setup = load(folder, case)
    load_of_experts = RouterLoad(model)
    balance = BalanceRouters(model, load_of_experts, 0.01)
    before = [router.e_score_correction_bias.clone() for router in balance.routers]
    loss_of(model, setup, rank)
    counts = [load_of_experts.counts[router].clone() for router in balance.routers]
    balance.on_step_end()
    biases = [router.e_score_correction_bias for router in balance.routers]
    return [(full(a - b), count) for a, b, count in zip(biases, before, counts, strict=True)]


def released_steps(
    rank: int, folder: Path, cases: list[tuple[dict[str, Any], str]]
) -> list[tuple[str, float, float, str]]:
    """(name, worst error of norms, of weights, its parameter) after two steps with released gradients, against
    ordinary ones, for pairs of layout and clipping. Then a loss that is not finite on one rank changes no weight on
    any, and a model that nobody laid out is refused."""
    results = []
    release_module.BYTES = 2**13  # a few weights of a tiny model
    for layout, clipping in cases:
        bound = None if clipping == "running" else 0.05
        norms: list[list[torch.Tensor]] = []
        weights: list[dict[str, torch.Tensor]] = []
        for releases in (False, True):
            model, setup = load(folder, Case(layout))
            optimizer = expertmesh.AdamW(model.parameters(), lr=1e-2, eps=1e-3, max_grad_norm=bound)
            release = expertmesh.GradientRelease(optimizer, clipping) if releases else None
            norms.append([])
            for _ in range(2):
                if release is None:
                    loss_of(model, setup, rank).backward()
                    norms[-1].append(clip_grad_norm(model.parameters(), float("inf")))
                else:
                    release.backward(functools.partial(loss_of, model, setup, rank))
                    norms[-1].append(release.grad_norm)
                    assert all(p.grad is None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            weights.append({name: full(p.detach()).clone() for name, p in model.named_parameters()})
        error = max(abs(float(a / b) - 1) for a, b in zip(*norms, strict=True))
        results.append((f"{layout} {clipping}", error, *worst(weights[1], weights[0])))
        release.backward(lambda m=model, s=setup: loss_of(m, s, rank) * (float("nan") if rank else 1.0))
        optimizer.step()
        assert not torch.isfinite(optimizer.grad_norm)
        after = {name: full(p.detach()) for name, p in model.named_parameters()}
        assert all(torch.equal(after[name], weights[1][name]) for name in after)
    alone = torch.nn.Linear(4, 1)
    release = expertmesh.GradientRelease(expertmesh.AdamW(alone.parameters()))
    try:
        release.backward(lambda: torch.nn.parallel.DistributedDataParallel(alone)(torch.ones(2, 4)).sum())
    except ValueError as error:
        assert "distributed_setup" in str(error)
        return results
    raise AssertionError("nobody refused DistributedDataParallel")


def clipped_alone(rank: int, folder: Path) -> float:
    """The norm that both ranks clip by, though rank 1 has no gradient at all."""
    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(3))
    if rank == 0:
        weight.grad = torch.tensor([3.0, 4.0, 12.0])
    return float(clip_grad_norm([weight], 1.0))


def exchanges(rank: int, folder: Path, case: Case) -> dict[str, int]:
    """How often a forward and a backward exchange row counts, and anything else."""
    model, setup = load(folder, case)
    count, real = {"counts": 0, "rows": 0}, dist.all_to_all_single

    def counting(output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count["counts" if rows.dtype == torch.int64 else "rows"] += 1
        return real(output, rows, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        loss_of(model, setup, rank).backward()
    finally:
        dist.all_to_all_single = real
    return count


def calls_of_ours(rank: int, folder: Path, case: Case) -> dict[str, int]:
    """How many Python calls of ours, by file, a forward and a backward of one layer with experts make."""
    model, setup = load(folder, case)
    loss_of(model, setup, rank).backward()
    layer, x = model.model.layers[0], torch.randn(1, 9, model.config.hidden_size, requires_grad=True)
    angles, calls = model.model.rotary_emb(x, torch.arange(9)[None]), Counter[str]()
    assert isinstance(layer.mlp.experts.forward, Dispatch)

    def count(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(expertmesh.__path__[0]) and frame.f_code.co_name[0] != "<":
            calls[file] += 1

    with in_call(Call(model)):
        for profile in (None, count):  # the first gathers weights, and asks what a forward asks once
            sys.setprofile(profile)
            layer(x, position_embeddings=angles, attention_mask=None).sum().backward()
        sys.setprofile(None)
    return calls


def widths(rank: int, folder: Path, dispatch: str, boxes: Path) -> set[int]:
    """The widths of all tables that the experts of one rank exchange in a forward and a backward."""
    if dispatch != "all_to_all":
        open_memory(boxes)
    model, setup = load(folder, Case({"ep_size": 2, "dispatch": dispatch}))
    seen: set[int] = set()
    all_to_all, begin = dist.all_to_all_single, Mailboxes.begin

    def sends(output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.update(table.shape[1] for table in (output, rows) if table.ndim > 1)
        return all_to_all(output, rows, *args, **kwargs)

    def begins(self: Mailboxes, parts: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.update(part.shape[1] for part in parts)
        return begin(self, parts, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", sends), mock.patch.object(Mailboxes, "begin", begins):
        loss_of(model, setup, rank).backward()
    return seen


def tokens_sent(rank: int, folder: Path, tokens: list[int], boxes: Path) -> tuple[list[int], list[str]]:
    """How many rows of hidden states one rank sends in a forward, by exchange, once mailboxes are large enough; and the
    tensors that exchanges keep for the backward, which are none.
    """
    open_memory(boxes)
    model, _ = load(folder, Case({"ep_size": 2, "dispatch": "gather"}))
    sent, send, kept, dispatch = list[int](), Mailboxes._send, list[str](), Gather.dispatch

    def sends(self: Mailboxes, place: Any, part: torch.Tensor) -> None:
        if part.shape[1:] == (model.config.hidden_size,):
            sent.append(len(part))
        send(self, place, part)

    def dispatches(self: Gather, *args: torch.Tensor) -> Any:
        rows = dispatch(self, *args)
        held = ((name, tree_leaves(value)) for name, value in vars(self).items())
        kept.extend(name for name, leaves in held if any(isinstance(leaf, torch.Tensor) for leaf in leaves))
        return rows

    with mock.patch.object(Mailboxes, "_send", sends), mock.patch.object(Gather, "dispatch", dispatches):
        for _ in range(2):
            sent.clear()
            model(input_ids=torch.arange(tokens[rank])[None])
    return sent, kept


def initialised(rank: int, family: str, cases: list[Case], tied: bool = False) -> list[dict[str, torch.Tensor]]:
    """Weights of `from_config` under every case; ranks are seeded differently, only rank 0's seed may count."""
    made = []
    for case in cases:
        torch.manual_seed(7 + rank)
        config = tiny_config(family, tie_word_embeddings=tied)
        model = expertmesh.AutoModelForCausalLM.from_config(config, distributed_setup=DistributedSetup(**case.setup))
        loss_of(model.train(), DistributedSetup(**case.setup), rank).backward()
        made.append({n: full(p.detach()) for n, p in model.named_parameters()})
    return made


def refusal(rank: int, folder: Path, setup: dict[str, Any]) -> str:
    """The error of a layout that does not fit the model."""
    try:
        load(folder, Case(setup))
    except ValueError as error:
        return str(error)
    return "no error"


def other_backend(rank: int, folder: Path, setup: dict[str, Any]) -> str:
    """The error of training with another experts backend than the one laid out for; without gradients there is none."""
    model, _ = load(folder, Case(setup))
    model.set_experts_implementation("grouped_mm")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model(input_ids=ids)
    try:
        model(input_ids=ids, labels=ids)
    except ValueError as error:
        return str(error)
    return "no error"


def experts_of(num_experts: int, local: slice) -> Any:
    """Some experts of a Mixtral layer, always with the same weights."""
    config = tiny_config("mixtral", num_local_experts=num_experts)
    config._experts_implementation = experts.NAME
    module = MixtralExperts(config)
    generator = torch.Generator().manual_seed(3)
    for name, param in list(module.named_parameters()):
        weights = torch.randn(param.shape, generator=generator) * 0.2
        setattr(module, name, torch.nn.Parameter(weights[local].clone()))
    module.num_experts = module.down_proj.shape[0]
    return module


def layer_inputs(num_tokens: int, favourite: int | None, seed: int) -> tuple[torch.Tensor, ...]:
    """hidden [T, H], ids [T, K], weights [T, K] and the output's gradient [T, H]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, 8, generator=generator).argsort(1)[:, :3]
    ids = ids if favourite is None else torch.full_like(ids, favourite)
    x, dout = (torch.randn(num_tokens, 32, generator=generator) for _ in range(2))
    return x.requires_grad_(), ids, torch.rand(num_tokens, 3, generator=generator).requires_grad_(), dout


class HostMemory:
    """Mailboxes of ranks on one machine: files in `folder` that all of them map, with barriers by gloo."""

    made = 0

    def __init__(self, folder: Path, group: dist.ProcessGroup, num_bytes: int) -> None:
        HostMemory.made += 1
        self.group = group
        paths = [folder / f"{HostMemory.made}-{rank}" for rank in dist.get_process_group_ranks(group)]
        paths[group.rank()].write_bytes(b"\xff" * num_bytes)
        dist.barrier(group)
        self.boxes = [torch.from_file(str(p), shared=True, size=num_bytes, dtype=torch.uint8) for p in paths]

    def of(self, rank: int) -> torch.Tensor:
        return self.boxes[rank]

    def barrier(self) -> None:
        dist.barrier(self.group)


def open_memory(folder: Path) -> Callable[[dist.ProcessGroup], Mailboxes]:
    """Let gather find mailboxes between CPUs of this machine; returns what now makes them."""
    made = functools.cache(lambda group: Mailboxes(group, functools.partial(HostMemory, folder, group)))
    gather.link_of = lambda group, place: made(group)
    return made


def called(module: Any, x: torch.Tensor, ids: Any, weights: Any, residual: Any, ahead: bool) -> torch.Tensor:
    """As a block calls its experts: with a residual, the exchange begun `ahead` of the router."""
    exchange = module.forward.transport(module.forward, x, ahead=True) if ahead else None
    return module(x, ids, weights, residual=residual, exchange=exchange)


def layers(
    rank: int,
    cases: list[tuple[tuple[int, ...], int | None]],
    with_triton: bool,
    dispatch: str,
    folder: Path,
    recompute: bool = False,
    backend: str = experts.NAME,
    ahead: bool = False,
) -> list[list[torch.Tensor]]:
    """One layer's output and gradients on this rank, for (tokens of each rank, favourite expert)."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    if dispatch == "mailboxes":
        link = open_memory(folder)(mesh["ep"].get_group())
        link.begin = begun = mock.Mock(wraps=link.begin)
    results = []
    for tokens, favourite in cases:
        module = experts_of(8, slice(rank * 8 // ranks, (rank + 1) * 8 // ranks))
        module.config._experts_implementation, module._is_expert_parallel = backend, True
        x, ids, weights, dout = layer_inputs(tokens[rank], favourite, seed=rank)
        with backends.interpreted() if with_triton else contextlib.nullcontext():
            module.forward = Dispatch(TRANSPORTS.get(dispatch, gather.Gather), module, mesh["ep"], mesh["tp"])
            residual = (dout * 3 + 1).view(1, *dout.shape).requires_grad_()

            run = functools.partial(checkpoint, called, use_reentrant=False) if recompute else called
            out = run(module, x, ids, weights, residual, ahead)
            out.backward(dout[None])
        assert torch.equal(residual.grad[0], dout) and out._base is None
        out = (out - residual)[0]
        results.append([out.detach(), x.grad, weights.grad, module.gate_up_proj.grad, module.down_proj.grad])
    if dispatch == "mailboxes":
        # a recompute ends where the experts have saved all
        assert begun.call_count == (5 if recompute else 4) * len(cases)
    return results


def mailboxes(rank: int, num_cases: int) -> int:
    """Random exchanges through device mailboxes, each equal to what the collectives make of it; how many."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.group.WORLD
    link = gather.link_of(group, "a test")
    assert isinstance(link, Mailboxes)
    collectives, shapes = gather.Collectives(group), random.Random(0)
    torch.manual_seed(rank)
    for _ in range(num_cases):
        rows, width, top_k = shapes.randint(1, 3000), 8 * shapes.randint(1, 300), shapes.randint(1, 10)
        parts = [torch.randn(rows, width, device="cuda").bfloat16(), torch.randn(rows, top_k, device="cuda")]
        for got, want in zip(link.all_gather(parts), collectives.all_gather(parts), strict=True):
            assert torch.equal(got, want)
        parts = [part.repeat(dist.get_world_size(), 1) for part in parts]
        wide = collectives.reduce_scatter([part.float() for part in parts])
        for got, want in zip(link.reduce_scatter(parts), wide, strict=True):
            torch.testing.assert_close(got, want.to(got.dtype))
        y, residual = torch.randn(9, width, device="cuda").bfloat16(), parts[0][: shapes.randint(1, rows)]
        routed = torch.randint(-1, 9, parts[1].shape, device="cuda", dtype=torch.int32), parts[1]
        (want,) = collectives.reduce_scatter([combine(y, *routed).float()])
        want[: len(residual)] += residual
        got = link.combine(y, *routed, residual)
        torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.02)
    return num_cases


def never_arrives(rank: int, seconds: float, folder: Path) -> str:
    """What rank 0 says when rank 1 does not come to the experts within the timeout."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    hosts = gather.cpu_group(dist.group.WORLD)
    assert gather.max_tokens(3 + rank, dist.group.WORLD, "layer 0") == 4
    told = folder / "told"
    if rank == 1:
        while not told.exists():
            time.sleep(0.05)
        return ""
    begin = time.monotonic()
    try:
        gather.max_tokens(3, dist.group.WORLD, "layer 1")
    except RuntimeError as error:
        assert hosts is gather.cpu_group(dist.group.WORLD) and time.monotonic() - begin < 10 * seconds
        return str(error)
    finally:
        told.touch()
    return "no error"


def never_arrives_at_a_layer(
    rank: int, model: Path, case: Case, layer: str, folder: Path, backward: bool = False
) -> str:
    """What rank 0 says in a step when rank 1 comes as far as the module `layer`, but not into it."""
    laid_out, setup = load(model, case)
    told = folder / "told"

    def stay_away(*_: Any) -> None:
        while not told.exists():
            time.sleep(0.05)
        raise InterruptedError

    if rank == 1 and backward:
        laid_out.get_submodule(layer).register_full_backward_pre_hook(stay_away)
    elif rank == 1:
        laid_out.get_submodule(layer).register_forward_pre_hook(stay_away, prepend=True)
    dist.barrier()
    try:
        loss_of(laid_out, setup, rank).backward()
        clip_grad_norm(laid_out.parameters(), 1.0)
    except InterruptedError:
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        told.touch()
    return "no error"


def loading_memory(rank: int, folder: Path, setup: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes: this rank's parameters, and how far its private memory rose at most while loading, and after it."""

    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    torch.utils.deterministic.fill_uninitialized_memory = False
    load(folder / "small", Case(setup))  # imports, process groups and thread pools are there
    before, peak, done = private(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model, _ = load(folder / "large", Case(setup))
    finally:
        done.set()
        watcher.join()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local), peak[0] - before, private() - before


def host_waits(rank: int, folder: Path, case: Case) -> dict[str, int]:
    """Waits for events in a forward and in a backward in which any other wait is an error."""
    model, setup = load(folder, case)
    batch = batches(setup.dp_size)[rank // setup.tp_size].to(model.device)
    loss_of(model, setup, rank, batch).backward()  # kernels compile, communicators start
    count, stage, real = {"forward": 0, "backward": 0}, "forward", torch.cuda.Event.synchronize

    def counting(event: torch.cuda.Event) -> None:
        count[stage] += 1
        real(event)

    torch.cuda.Event.synchronize = counting
    torch.cuda.set_sync_debug_mode("error")
    loss = loss_of(model, setup, rank, batch)
    stage = "backward"
    loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    return count


def recorded(rank: int, folder: Path, case: Case) -> list[tuple[float, float, float]]:
    """Of each step of a `GraphedStep`, against a model whose steps run as always: errors of loss, gradients, and logits
    of an evaluation after both moved by their gradients.
    """
    (model, setup), (other, _) = load(folder, case), load(folder, case)

    def run(model: Any, batch: torch.Tensor) -> torch.Tensor:
        loss = loss_of(model, setup, rank, batch)
        loss.backward()
        return loss.detach()

    def move(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
        model.zero_grad()

    def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
        out = model.eval()(input_ids=batch, use_cache=False).logits.clone()
        model.train()
        return out

    errors = []
    with contextlib.closing(GraphedStep(model, functools.partial(run, model))) as step:
        for seed in range(WARM_UP + 4):
            generator = torch.Generator().manual_seed(10 * seed + rank)
            batch = torch.randint(3, 128, (2, LENGTHS[rank]), generator=generator).to(model.device)
            loss, want = step(batch=batch), run(other, batch)
            mine, theirs = (
                {n: full(p.grad) for n, p in m.named_parameters() if p.grad is not None} for m in (model, other)
            )
            with torch.no_grad():
                move(model), move(other)
                a, b = logits(model, batch), logits(other, batch)
            errors.append(
                (float(abs(loss / want - 1)), worst(mine, theirs)[0], float((a - b).abs().max() / b.abs().max()))
            )
        assert step.replayed == 4
    return errors


def not_recordable(rank: int, folder: Path) -> str:
    """What the error says where documents are packed, and the model has to look for them."""
    model = expertmesh.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().train()
    ids, positions = torch.arange(3, 19, device="cuda")[None], torch.arange(8, device="cuda").repeat(2)[None]
    step = GraphedStep(model)
    try:
        for _ in range(WARM_UP + 1):
            model.zero_grad()
            step(input_ids=ids, labels=ids, position_ids=positions)
    except RuntimeError as error:
        return str(error)
    return "recorded"
