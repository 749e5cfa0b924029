"""Recorded steps, with a tape in the place of CUDA graphs: what is recorded when, and that nothing else changes."""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from expertmesh import AutoModelForCausalLM, Trainer
from expertmesh.bench.tiny import tiny_config, tiny_model
from expertmesh.data import demo_tokenizer
from expertmesh.moe import gather as links
from expertmesh.moe.block import routers
from expertmesh.train import graphed
from expertmesh.train.balance import BIAS, BalanceRouters
from expertmesh.train.buckets import fused_base, one_row
from expertmesh.train.config import ConfigError, load_config
from expertmesh.train.graphed import MAX_GRAPHS, WARM_UP, GraphedStep
from expertmesh.train.metrics import read_metrics
from expertmesh.train.run import run as run_recipe
from tests.distributed.ranks import on_ranks
from tests.models import load_ours
from tests.train import tape
from tests.train.runs import tiny_run
from tests.train.tape import Tape

not_owned = graphed._not_owned  # the tape has another in its place


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    tape.instead_of_cuda(monkeypatch)
    Tape.made.clear()


def model(family="qwen3_moe"):
    """Of operations that wait for nothing, on a CPU, too: our experts there want to know their rows."""
    torch.manual_seed(0)
    made = tiny_model(family).train()
    made.set_experts_implementation("batched_mm")
    return made


def batch(rows=2, seed=0):
    ids = torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def eager(module, **inputs):
    module.zero_grad()
    loss = module(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(module)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def replays():
    return sorted(each.replays for each in Tape.made)


def test_replayed_losses_and_gradients_are_those_of_each_batch():
    module = model()
    other, step, losses = copy.deepcopy(module), GraphedStep(module), []
    for seed in range(WARM_UP + 3):
        module.zero_grad()
        losses.append(step(**batch(seed=seed)))
        want, wanted = eager(other, **batch(seed=seed))
        close(losses[-1], want)
        close(gradients(module), wanted)
    assert replays() == [3] and step.replayed == 3
    assert len(set(map(float, losses))) == len(losses)  # none is an alias of the recorded one
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_memory_that_is_not_owned_is_the_same_memory(dtype):
    x = torch.randn(6, 4).to(dtype)
    for strided in (x, x[1:].T, x[:0], x.new_empty(0)):
        alias = not_owned(strided)
        assert alias.data_ptr() == strided.data_ptr() and alias.stride() == strided.stride()
        assert alias.dtype == dtype and torch.equal(alias.float(), strided.float())


def test_every_shape_is_warmed_up_and_recorded_up_to_a_number():
    module = nn.Linear(3, 1)
    step = GraphedStep(module, lambda x, scale: run(module, x, scale))
    for rows in range(1, MAX_GRAPHS + 3):
        for _ in range(WARM_UP + 2):
            module.zero_grad()
            step(x=torch.ones(rows, 3), scale=1)
    assert replays() == [2] * MAX_GRAPHS
    for _ in range(WARM_UP):  # another number is another shape, and mode, too
        module.zero_grad()
        step(x=torch.ones(1, 3), scale=2)
    module.eval()
    module.zero_grad()
    step(x=torch.ones(1, 3), scale=1)
    assert replays() == [2] * MAX_GRAPHS


def run(module, x, scale=1):
    loss = module(x).sum() * scale
    loss.backward()
    return loss


def test_the_caller_s_batch_is_copied_and_stays_his():
    module = nn.Linear(3, 1)
    step = GraphedStep(module, lambda x: run(module, x["nested"]))
    for value in range(WARM_UP + 3):
        x = torch.full((1, 3), float(value))
        module.zero_grad()
        step(x={"nested": x})
        assert (x == value).all() and (module.weight.grad == value).all()
    assert replays() == [3]


def test_a_count_that_lies_elsewhere_is_recorded_where_the_model_is():
    """A graph reads what is on its device anew, and keeps the value of what is not."""
    places = []
    step = GraphedStep(
        nn.Linear(1, 1, device="meta"), lambda count: (places.append(count.device.type), torch.ones(()) + 1)[1]
    )
    for number in range(WARM_UP + 2):
        step(count=torch.tensor(number))
    assert places == ["cpu"] * WARM_UP + ["meta"] and step.replayed == 2


def test_gradients_to_accumulate_into_make_a_step_run_as_always():
    module = nn.Linear(3, 1)
    step = GraphedStep(module, lambda x: run(module, x))
    for _ in range(WARM_UP + 1):
        module.zero_grad()
        step(x=torch.ones(1, 3))
    before = module.weight.grad.clone()
    module.weight.grad = before.clone()
    step(x=torch.ones(1, 3))
    assert (module.weight.grad == 2 * before).all() and replays() == [1]


def test_what_cannot_be_recorded_is_told_and_leaves_nothing_behind():
    module = nn.Linear(3, 1)

    def waits(x):
        return run(module, x, float(x.max()))

    step = GraphedStep(module, waits)
    for _ in range(WARM_UP - 1):
        step(x=torch.ones(1, 3))
        module.zero_grad()
    with pytest.raises(RuntimeError, match=r"cannot be recorded .* waits for the GPU in .*, line .*cuda_graph=False"):
        step(x=torch.ones(1, 3))
    assert not step._recorded


def test_a_closed_step_begins_anew():
    module = nn.Linear(3, 1)
    with contextlib.closing(GraphedStep(module, lambda x: run(module, x))) as step:
        for _ in range(WARM_UP + 1):
            step(x=torch.ones(1, 3))
            module.zero_grad()
        (first,) = Tape.made
    assert not first.operations
    step(x=torch.ones(1, 3))
    assert replays() == [1, 1]


def test_larger_mailboxes_are_recorded_anew_and_each_replay_is_between_two_barriers(monkeypatch):
    class Box:
        met = 0

        def barrier(self):
            self.met += 1

    link = type("Link", (), {"boxes": [Box(), Box()]})()
    monkeypatch.setattr(links, "_open_mailboxes", lambda: [link])
    module = nn.Linear(3, 1)
    step = GraphedStep(module, lambda x: run(module, x))

    def again():
        module.zero_grad()
        step(x=torch.ones(1, 3))

    for _ in range(WARM_UP + 2):
        again()
    assert replays() == [2] and link.boxes[0].met == 2
    link.boxes = [Box(), Box()]
    again()
    assert replays() == [1, 2] and link.boxes[0].met == 2


def lenient(module, run):
    return GraphedStep(module, lambda x: run(module, x), strict=False)


def steps_of(step, module, count=WARM_UP + 3):
    """Gradients of steps with 1, 2, … as input."""
    found = []
    for value in range(1, count + 1):
        module.zero_grad()
        step(x=torch.full((1, 3), float(value)))
        found.append(module.weight.grad.clone())
    return found


def test_a_rehearsal_finds_what_waits_and_steps_go_on_as_always(caplog):
    module = nn.Linear(3, 1)
    step = lenient(module, lambda module, x: run(module, x, float(x.max())))
    want = [torch.full((1, 3), float(value * value)) for value in range(1, WARM_UP + 4)]
    close(steps_of(step, module), want)
    assert step.gave_up and not Tape.made and not step.replayed
    assert caplog.text.count("CUDA graphs are switched off") == 1 and "waits for the GPU" in caplog.text


def test_a_recording_that_fails_all_the_same_loses_nothing(caplog):
    module = nn.Linear(3, 1)

    def fails(module, x):
        loss = run(module, x)
        if Tape.made:  # that is, while recording: its gradients are there by now, and nothing will ever fill them
            Tape.made.clear()
            raise torch.OutOfMemoryError("out of memory")
        return loss

    step = lenient(module, fails)
    want = [torch.full((1, 3), float(value)) for value in range(1, WARM_UP + 4)]
    close(steps_of(step, module), want)
    assert step.gave_up and not step.replayed and "out of memory" in caplog.text


def test_shapes_without_end_and_no_memory_to_spare_end_the_recording(caplog, monkeypatch):
    module = nn.Linear(3, 1)
    step = lenient(module, run)
    for rows in range(1, graphed.MANY_SHAPES + 3):
        module.zero_grad()
        step(x=torch.ones(rows, 3))
    assert step.gave_up and "too many shapes" in caplog.text
    monkeypatch.setattr(graphed, "_has_room", lambda: False)
    step = lenient(module, run)
    steps_of(step, module)
    assert step.gave_up and "memory" in caplog.text and not Tape.made
    step = GraphedStep(module, lambda x: run(module, x))  # who asks for it gets it
    steps_of(step, module)
    assert step.replayed == 3


@pytest.mark.parametrize(("free", "fits"), [(59, False), (60, True)])
def test_a_recording_leaves_room_for_two_steps(free, fits, monkeypatch):
    """A step takes 50 of bytes beyond the 20 that stay, and PyTorch has 40 in reserve."""
    memory = {"mem_get_info": (free, 999), "memory_reserved": 60, "memory_allocated": 20, "max_memory_allocated": 70}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert graphed._has_room() == fits


def test_weights_frozen_later_are_another_step():
    module = nn.Linear(3, 1)
    step = lenient(module, run)
    steps_of(step, module)
    module.zero_grad()
    module.bias.requires_grad_(False)
    step(x=torch.ones(1, 3))
    assert module.bias.grad is None and step.replayed == 3


def shapes_of_ranks(rank):
    """What is replayed when rank 1 gets a new shape, or has gradients already; then the first shapes again."""
    dist.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tape.instead_of_cuda(monkeypatch)
        module, counts = nn.Linear(3, 1), []
        step = GraphedStep(module, lambda x: run(module, x))
        for other, stale in [(1, False)] * (WARM_UP + 2) + [(2, False), (1, True), (1, False)]:
            if not (stale and rank == 1):
                module.zero_grad()
            step(x=torch.ones(other if rank == 1 else 1, 3))
            counts.append(step.replayed)
        return counts


def test_ranks_replay_together_or_not_at_all():
    want = [0] * WARM_UP + [1, 2, 2, 2, 3]
    assert on_ranks(2, shapes_of_ranks) == [want, want]


def sharded_weights(rank):
    """Losses of evaluations between steps, and what one process gets. FSDP keeps the root gathered after a forward."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    losses = []
    for recorded in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        fully_shard(module[0])
        fully_shard(module)
        with pytest.MonkeyPatch.context() as monkeypatch:
            tape.instead_of_cuda(monkeypatch)
            # a tape cannot replay exchanges: what counts here is what FSDP's Python knows around a replay
            monkeypatch.setattr(graphed._Recorded, "__init__", lambda self, step, batch: vars(self).update(step=step))
            monkeypatch.setattr(graphed._Recorded, "mailboxes", [], raising=False)
            monkeypatch.setattr(graphed._Recorded, "replay", replay_beside_fsdp)
            always = functools.partial(run, module)
            step = GraphedStep(module, always) if recorded else always
            seen = []
            for value in range(WARM_UP + 3):
                step(x=torch.full((1, 4), float(value)))
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.01 * parameter.grad
                    module.zero_grad()
                    seen.append(float(module(torch.ones(1, 4)).sum()))
            losses.append(seen)
    return losses


def replay_beside_fsdp(self, batch):
    """Gradients without a call of the sharded modules: from whole copies of the weights."""
    weights = [p.full_tensor().detach().requires_grad_() for p in self.step.model.parameters()]
    hidden = nn.functional.linear(batch["x"], *weights[:2])
    loss = nn.functional.linear(hidden, *weights[2:]).sum()
    loss.backward()
    for parameter, weight in zip(self.step.model.parameters(), weights, strict=True):
        parameter.grad = dist.tensor.distribute_tensor(weight.grad, parameter.device_mesh, parameter.placements)
    return loss.detach()


def test_evaluation_between_replays_sees_the_new_weights():
    for recorded, always in on_ranks(2, sharded_weights):
        assert recorded == pytest.approx(always, rel=1e-5)


# --- in the Trainer


def arguments(folder, **changes):
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return transformers.TrainingArguments(str(folder), **settings | quiet | changes)


def rows():
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 128, (12,), generator=generator).tolist() for _ in range(64)]
    return [{"input_ids": ids, "labels": [-100] * (i % 5) + ids[i % 5 :], "attention_mask": [1] * 9 + [0] * (i % 4)
             + [1] * (3 - i % 4)} for i, ids in enumerate(rows)]  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the Trainer record without a GPU."""
    monkeypatch.setattr("expertmesh.train.trainer.why_not", lambda trainer: None)


def trained(folder, cuda_graph, family="qwen3_moe", balance=None, **changes):
    module = model(family)
    trainer = Trainer(module, arguments(folder, **changes), train_dataset=rows(), eval_dataset=rows()[:8],
                      cuda_graph=cuda_graph)  # fmt: skip
    if balance:
        trainer.add_callback(BalanceRouters(module, trainer.load, balance))
    trainer.train()
    return trainer


@pytest.mark.parametrize("changes", [{}, {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps",
                                          "save_steps": 5}])  # fmt: skip
def test_a_recorded_run_logs_what_any_other_does(tmp_path, on_cpu, changes):
    runs = [trained(tmp_path / str(on), on, **changes) for on in (True, False)]
    (graph,) = Tape.made or [None]
    records = [read_metrics(tmp_path / str(on) / "metrics.jsonl") for on in (True, False)]
    assert len(records[0]) == len(records[1]) >= 5
    for mine, other in zip(*records, strict=True):
        timed = {"time", "tokens_per_second"} | {key for key in other if "runtime" in key or "_per_second" in key}
        assert mine.keys() == other.keys()
        for key in mine.keys() - timed - {"moe_layers"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key
        assert mine.get("moe_layers") == other.get("moe_layers")
    loads = [run.load for run in runs]
    assert (loads[0].total == loads[1].total).all() and (loads[0].last == loads[1].last).all()
    assert runs[0]._graphed is None and (graph is None or not graph.operations)


def test_steps_are_replayed_and_recordings_dropped_at_the_end_and_on_errors(tmp_path, on_cpu, monkeypatch):
    kept = []
    close = GraphedStep.close
    monkeypatch.setattr(GraphedStep, "close", lambda self: (kept.append((self, len(self._recorded))), close(self)))
    trained(tmp_path, True)
    assert [(step.replayed, recorded) for step, recorded in kept] == [(8 - WARM_UP, 1)]

    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == WARM_UP + 2:
                raise KeyboardInterrupt

    trainer = Trainer(model(), arguments(tmp_path / "b"), train_dataset=rows(), cuda_graph=True)
    trainer.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._graphed is None and kept[-1][1] == 1 and not kept[-1][0]._recorded


def test_routers_are_balanced_by_the_rows_of_replayed_steps(tmp_path, on_cpu):
    runs = [trained(tmp_path / str(on), on, "deepseek_v3", balance=0.02) for on in (True, False)]
    biases = [[getattr(router, BIAS) for _, router in routers(run.model)] for run in runs]
    for mine, other in zip(*biases, strict=True):
        assert torch.equal(mine, other)


def test_a_run_without_a_single_replay_says_so(tmp_path, on_cpu, caplog):
    trained(tmp_path, True, max_steps=WARM_UP)
    assert "replayed no step" in caplog.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "NVIDIA GPU, and this run is on cpu"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}, "host memory"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"recompute": "offload"}},
            "host memory",
        ),
        ({"torch_empty_cache_steps": 2}, "torch_empty_cache_steps"),
    ],
)
def test_what_is_known_not_to_work_is_refused_with_what_to_change(tmp_path, changes, text, monkeypatch):
    trainer = Trainer(model(), arguments(tmp_path, **changes), train_dataset=rows())
    if changes:
        monkeypatch.setattr(transformers.TrainingArguments, "device", torch.device("cuda"))
    assert text in graphed.why_not(trainer)
    trainer.cuda_graph = True
    with pytest.raises(ValueError, match=f"{text}.*set cuda_graph=False"):
        trainer._records()


def test_without_a_gpu_the_trainer_refuses_at_once(tmp_path):
    with pytest.raises(ValueError, match="on cpu"):
        Trainer(model(), arguments(tmp_path), train_dataset=rows(), cuda_graph=True)


@pytest.mark.parametrize(("name", "refused"), [("expertmesh", True), ("expertmesh-gather", False)])
def test_a_dispatch_that_waits_is_refused(tmp_path, name, refused, monkeypatch):
    trainer = Trainer(model(), arguments(tmp_path), train_dataset=rows())
    monkeypatch.setattr(transformers.TrainingArguments, "device", torch.device("cuda"))
    trainer.model.config.distributed_config = type("Layout", (), {"ep_size": 2, "ep_implementation": name})()
    assert ("dispatch='gather'" in (graphed.why_not(trainer) or "")) == refused


# --- by default, where it works and pays


def fused_model(family="qwen3_moe", **options):
    """Ours, as far as it waits for nothing on a CPU."""
    plain = {"experts": False, "linear_cross_entropy": False}
    made = load_ours(family, fused=plain, **options).train()
    made.set_experts_implementation("batched_mm")
    return made


def of_changing_lengths(count=64):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 15, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 128, (n,), generator=generator).tolist()} for n in lengths]


def in_rows(examples):
    """Padded behind; every third batch needs no padding."""
    longest = max(len(example["input_ids"]) for example in examples)
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


packed = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")


def by_default(folder, collator=in_rows, module=None, cls=Trainer, cuda_graph="auto", **changes):
    trainer = cls(fused_model() if module is None else module, arguments(folder, logging_steps=1, **changes),
                  data_collator=collator, train_dataset=of_changing_lengths(), cuda_graph=cuda_graph)  # fmt: skip
    trainer.train()
    return trainer


def same_logs(one, other):
    for mine, theirs in zip(one.state.log_history, other.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "grad_norm", "moe/load_cv", "moe/max_vio"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert (one.load.total == other.load.total).all()


@pytest.mark.parametrize("collator", [in_rows, packed])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_rows_of_changing_lengths_are_replayed_by_default(tmp_path, on_cpu, family, collator):
    mine = by_default(tmp_path / "a", collator, fused_model(family))
    assert sum(replays()) >= 8 - 2 * WARM_UP > 0
    same_logs(mine, by_default(tmp_path / "b", collator, fused_model(family), cuda_graph=False))


def test_rows_of_one_length_stay_rows(tmp_path, on_cpu, monkeypatch):
    monkeypatch.setattr("expertmesh.train.trainer.pad_to_bucket", None)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 67).view(16, 4).repeat(4, 1).tolist()]
    trainer = Trainer(fused_model(), arguments(tmp_path), train_dataset=rows)
    trainer.train()
    assert replays() == [8 - WARM_UP]


def test_without_a_gpu_nothing_is_recorded_and_that_is_said_once(tmp_path, caplog):
    by_default(tmp_path)
    assert not Tape.made and caplog.text.count("Steps are not recorded as CUDA graphs: it needs an NVIDIA GPU") == 1


def test_many_tokens_are_not_recorded(tmp_path, on_cpu, caplog, monkeypatch):
    monkeypatch.setattr("expertmesh.train.trainer.MOST_TOKENS", 10)
    mine = by_default(tmp_path / "a")
    assert not Tape.made and caplog.text.count("a batch has more than 10 tokens per GPU") == 1
    same_logs(mine, by_default(tmp_path / "b", cuda_graph=False))


class OwnLoss(Trainer):
    seen = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen += len(inputs["input_ids"]) == self.args.train_batch_size  # as the collator made it
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_code_of_the_user_s_runs_at_every_step_unless_he_asks_for_recording(tmp_path, on_cpu, caplog):
    assert by_default(tmp_path / "a", cls=OwnLoss).seen == 8
    assert "compute_loss is your code" in caplog.text and not Tape.made
    module, seen = fused_model(), []
    module.lm_head.register_forward_hook(lambda *_: seen.append(1))
    by_default(tmp_path / "b", module=module)
    assert len(seen) == 8 and "a hook on lm_head is your code" in caplog.text
    assert by_default(tmp_path / "c", cls=OwnLoss, cuda_graph=True).seen < 8


def test_a_step_that_waits_goes_on_as_always(tmp_path, on_cpu, caplog):
    waiting = {"fused": {"experts": False, "linear_cross_entropy": True}}  # whose CPU path counts labels
    mine = by_default(tmp_path / "a", module=load_ours("qwen3_moe", **waiting))
    assert caplog.text.count("CUDA graphs are switched off") == 1 and not Tape.made
    same_logs(mine, by_default(tmp_path / "b", module=load_ours("qwen3_moe", **waiting), cuda_graph=False))


def test_a_weight_of_the_loss_that_changes_is_seen(tmp_path, on_cpu):
    class Raise(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            model.mtp_loss_weight = 0.1 * (state.global_step // 6)

    plain = {"experts": False, "linear_cross_entropy": False}
    module = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"), mtp_loss_weight=1.0, fused=plain)
    module.set_experts_implementation("batched_mm")
    module.mtp_loss_weight = None
    trainer = Trainer(module, arguments(tmp_path, max_steps=12), data_collator=packed,
                      train_dataset=of_changing_lengths())  # fmt: skip
    trainer.add_callback(Raise())
    trainer.train()
    assert replays() == [5 - WARM_UP, 6 - WARM_UP]  # in the first step it was None


def buckets_of_ranks(rank):
    """What each rank's batch is brought to: full rows on both, then longer ones on one, then one that cannot be."""
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    trainer = SimpleNamespace(cuda_graph=True, _base=fused_base(model), _buckets=[], _full_shape=None)
    found = []
    for length, hole in [((12, 12), False), ((12, 70), False), ((12, 12), True)]:
        ids = torch.arange(3, 3 + length[rank])[None]
        batch = {"input_ids": ids, "labels": ids}
        filled, few = Trainer._into_bucket(trainer, batch, None if hole and rank else one_row(batch))
        found.append((tuple(filled["input_ids"].shape), "bucketed" in filled, few))
    return found


def test_ranks_bring_their_batches_to_the_same_bucket():
    same = [((1, 12), False, True), ((1, 128), True, True), ((1, 12), False, True)]
    assert on_ranks(2, buckets_of_ranks) == [same, same]


# --- in TRL's and in recipes


def fine_tuned(folder, cuda_graph):
    from datasets import Dataset
    from trl import SFTConfig

    from expertmesh.train.sft import SFTTrainer

    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows()])
    options = arguments(folder).to_dict() | {"output_dir": str(folder), "max_length": None, "bf16": False}
    options |= {"router_aux_loss_coef": 0.3, "eval_strategy": "steps", "eval_steps": 6}
    args = SFTConfig(**{key: value for key, value in options.items() if key in SFTConfig.__dataclass_fields__})
    trainer = SFTTrainer(model(), args, train_dataset=data, eval_dataset=data.select(range(8)),
                         processing_class=demo_tokenizer(), cuda_graph=cuda_graph)  # fmt: skip
    trainer.train()
    return read_metrics(folder / "metrics.jsonl")


def test_a_recorded_sft_run_learns_the_same_without_trl_s_waits(tmp_path, on_cpu):
    recorded, always = (fine_tuned(tmp_path / str(on), on) for on in (True, False))
    assert replays() == [8 - WARM_UP]
    for mine, other in zip(recorded, always, strict=True):
        assert other.keys() == mine.keys()
        for key in mine.keys() - {"time", "step"}:
            if isinstance(mine[key], float) and "second" not in key and "runtime" not in key:
                assert mine[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.fixture
def own_loss(monkeypatch):
    """Let SFTTrainer take the loss of a head that makes logits: the one that does not asks for values on a CPU."""
    monkeypatch.setattr("expertmesh.train.sft.SFTTrainer.why_not_own_loss", lambda self: None)


def fine_tuned_by_default(folder, **changes):
    from datasets import Dataset
    from trl import SFTConfig

    from expertmesh.train.sft import SFTTrainer

    options = arguments(folder, logging_steps=1).to_dict() | {"output_dir": str(folder), "bf16": False} | changes
    args = SFTConfig(**{key: value for key, value in options.items() if key in SFTConfig.__dataclass_fields__})
    data = Dataset.from_list(changes.pop("rows", None) or of_changing_lengths(200))
    trainer = SFTTrainer(fused_model(), args, train_dataset=data, processing_class=demo_tokenizer(),
                         cuda_graph=changes.pop("cuda_graph", "auto"))  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
def test_fine_tuning_records_padded_and_packed_rows_by_default(tmp_path, on_cpu, own_loss, packing):
    changes = {"packing": packing, "max_length": 60, "router_aux_loss_coef": 0.3, "per_device_train_batch_size": 2}
    mine = fine_tuned_by_default(tmp_path / "a", **changes)
    assert sum(replays()) >= 8 - 2 * WARM_UP
    other = fine_tuned_by_default(tmp_path / "b", **changes, cuda_graph=False)
    for one, two in zip(mine.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        for key in ("loss", "grad_norm", "moe/load_cv", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
    assert (mine.load.total == other.load.total).all()


def test_fine_tuning_on_rows_of_one_length_does_not_look_at_masks_of_ones(tmp_path, on_cpu, own_loss):
    rows = [{"input_ids": list(range(i, i + 9))} for i in range(3, 67)]
    fine_tuned_by_default(tmp_path, rows=rows)
    assert replays() == [8 - WARM_UP]


def test_another_loss_is_not_recorded_by_default(tmp_path, on_cpu, caplog):
    assert "entropy" in fine_tuned_by_default(tmp_path, loss_type="dft").state.log_history[0]
    assert not Tape.made and "the model's own loss" in caplog.text


def test_a_loss_that_is_not_the_model_s_is_refused(tmp_path, on_cpu):
    from datasets import Dataset
    from trl import SFTConfig

    from expertmesh.train.sft import SFTTrainer

    data = Dataset.from_list([{"input_ids": [3, 4]}])
    args = SFTConfig(str(tmp_path), loss_type="dft", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="because of loss_type='dft'. Leave that out"):
        SFTTrainer(model(), args, train_dataset=data, processing_class=demo_tokenizer(), cuda_graph=True)


def test_a_recipe_s_batches_have_one_shape(tmp_path, on_cpu):
    changes = {
        "train__max_steps": 6,
        "model__fused": "{experts: false, linear_cross_entropy: false}",
        "data__max_length": 64,
    }
    for on in (True, False):
        config = load_config(None, tiny_run(tmp_path / str(on), **changes, train__cuda_graph=on))
        assert run_recipe(config).final is not None
    assert replays() == [6 - WARM_UP]
    for mine, other in zip(*(read_metrics(tmp_path / str(on) / "metrics.jsonl") for on in (True, False)), strict=True):
        for key in mine.keys() & {"loss", "grad_norm", "moe/max_vio", "eval_loss"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_recipe_whose_batches_cannot_be_recorded_is_refused():
    with pytest.raises(ConfigError, match="set `auto`, or remove `train.gradient_accumulation_steps`"):
        load_config(None, ["train.cuda_graph=true", "train.gradient_accumulation_steps=2"])
