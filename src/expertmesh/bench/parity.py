"""Compare expertmesh with stock Transformers: results and saved files, from the same weights.

Both sides load one checkpoint and get the same tokens. On the CPU everything is float32, and each tensor may differ by
at most 1e-5 of its largest value (`errors`). On CUDA both sides run in bfloat16, and the error of expertmesh
against stock in float32 may be at most 1.5 times stock's own (`noise`). `expertmesh check` prints the rows; the tests
assert on them.
"""

import contextlib
import functools
import inspect
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers import AutoModelForCausalLM as StockAutoModelForCausalLM

from expertmesh.bench.export import differing_tensors, export_rows
from expertmesh.bench.per_document import needs_per_document, run_per_document, supports_packing
from expertmesh.bench.rows import Row, relative_error, rms_errors, worst_error
from expertmesh.bench.tiny import FAMILIES, tiny_model

CPU_TOLERANCE = 1e-5
CUDA_RATIO = 1.5
LENGTH = 16
MTP_KEY = "num_nextn_predict_layers"


@dataclass(frozen=True)
class Case:
    """One kind of input. `batch` is a kind of `make_batch`; `routing` is a kind of `bend_routing`, applied before."""

    name: str
    batch: str = "plain"
    routing: str | None = None
    aux: bool = False
    accumulated: bool = False
    checkpointing: bool = False
    poisoned: bool = False


CASES = (
    Case("plain"),
    Case("right padding", batch="right"),
    Case("left padding", batch="left"),
    Case("packed", batch="packed"),
    Case("accumulated", accumulated=True),
    Case("aux loss", batch="right", aux=True),
    Case("aux loss, accumulated", batch="right", aux=True, accumulated=True),
    Case("checkpointing", checkpointing=True),
    Case("experts without tokens", routing="starved"),
    Case("all on the same experts", routing="one"),
    Case("ties", routing="ties"),
    Case("poisoned memory", routing="starved", poisoned=True),
)


@dataclass
class Outcome:
    """The results of one model in one case; all values are float32 on the CPU."""

    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)


def make_batch(kind: str, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return tokens and labels [2, 16] of one kind: `plain`, padded on the `left` or `right`, or `packed` with
    position_ids. A few tokens in every row have the label -100, as prompts do.
    """
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, vocab_size, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, 4:7] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[1, slice(0, 5) if kind == "left" else slice(-5, None)] = 0
        labels[mask == 0] = -100
        batch["attention_mask"] = mask
    elif kind == "packed":
        first, second = torch.arange(6), torch.arange(LENGTH - 6)
        batch["position_ids"] = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
        labels[0, 6] = labels[1, LENGTH - 6] = -100
    return {name: tensor.to(device) for name, tensor in batch.items()}


def per_expert(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters [E, ...] of all routers and all stacks of experts in the model, by name."""
    num_experts = {module.num_experts for module in model.modules() if hasattr(module, "_apply_gate")}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(r"\.(experts|gate|router)\.", name) and parameter.shape[0] in num_experts
    }


def router_weights(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the weight [E, H] of every router in the model, by name."""
    return {
        name: parameter
        for name, parameter in per_expert(model).items()
        if ".experts." not in name and parameter.ndim == 2 and name.endswith("weight")
    }


def top_k_of(model: PreTrainedModel) -> int:
    """Return the number of experts per token, whose key has three names among the families."""
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "moe_k", "moe_topk")
    value = next(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    return value if isinstance(value, int) else value[0]


@torch.no_grad()
def bend_routing(model: PreTrainedModel, kind: str) -> None:
    """Force the routing, in place: `starved` (half the experts get no token), `one` (all tokens go to the same
    experts), `ties` (all experts are equal, so that any choice is right).

    A router without bias can be steered only through its input. A vector added to every embedding gives the tokens of
    the `plain` batch a common direction, and each router's weight gets a component along that direction.
    """
    weights = router_weights(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"\.(gate|router)\.(.*\.)?(bias|e_score_correction_bias)$", name):
            tensor.zero_()
    if kind == "ties":
        for parameter in per_expert(model).values():
            parameter.copy_(parameter[:1].expand_as(parameter))
        return

    def steer(weight: torch.Tensor, router: torch.nn.Module, inputs: tuple) -> None:
        x_TH = inputs[0].flatten(0, -2).double()
        shared_H = torch.linalg.pinv(x_TH, rtol=0.05).sum(1).to(weight)  # x_TH @ shared_H is about 1 for every token
        num_chosen = weight.shape[0] // 2 if kind == "starved" else top_k_of(model)
        weight.mul_(0.5)
        weight[:num_chosen] += 3 * shared_H
        weight[num_chosen:] -= 3 * shared_H

    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    embedding += 0.5 * torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(3)).to(embedding)
    hooks = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(functools.partial(steer, weight))
        for name, weight in weights.items()
    ]
    batch = make_batch("plain", model.config.get_text_config().vocab_size, model.device)
    model.eval()(input_ids=batch["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context manager in which uninitialized memory reads as NaN, both in recycled blocks and from `torch.empty`."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    blocks = [torch.full((2**power,), math.nan) for power in range(4, 20) for _ in range(4)]
    del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def gradients_of(model: PreTrainedModel, over_experts: bool = False) -> dict[str, torch.Tensor | None]:
    """Return all gradients by name, float32 on the CPU; `over_experts` sums those of shape [E, ...] over E."""
    summed = per_expert(model) if over_experts else {}
    gradients: dict[str, torch.Tensor | None] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.detach().float().cpu()
            gradient = gradient.sum(0) if name in summed else gradient
        gradients[name] = gradient
    return gradients


def run_case(
    model: PreTrainedModel, case: Case, share_of_aux: Callable[[dict], float] | None = None, per_document: bool = False
) -> Outcome:
    """Run a training step without optimizer, then an evaluation, of one model on one case.

    `share_of_aux` is given for stock and returns the share of the router aux loss that expertmesh adds; stock adds all
    of it to every micro-batch. `per_document`: call the model on each document separately.
    """
    call = functools.partial(run_per_document, model) if per_document else model
    batch = make_batch(case.batch, model.config.get_text_config().vocab_size, model.device)
    extra: dict = {"output_router_logits": True} if case.aux else {}
    if case.accumulated:
        extra["num_items_in_batch"] = torch.tensor(50, device=model.device)
    outcome = Outcome({})

    def record(prefix: str, out) -> None:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).cpu()  # ignore values at padding
        outcome.values[f"{prefix} logits"] = out.logits.detach().float().cpu() * mask[..., None]
        if case.aux:
            outcome.values[f"{prefix} aux loss"] = out.aux_loss.detach().float().cpu()
            outcome.values[f"{prefix} router logits"] = torch.cat(
                [logits.detach().float().cpu().flatten(0, -2) * mask.view(-1, 1) for logits in out.router_logits]
            )

    model.train()
    model.zero_grad(set_to_none=True)
    if case.checkpointing:
        model.activation_checkpointing_enable()
    with poisoned_memory() if case.poisoned else contextlib.nullcontext():
        torch.manual_seed(0)
        out = call(**batch, **extra, use_cache=False)
        loss = out.loss
        if case.aux and share_of_aux is not None:
            loss = loss + (share_of_aux(batch | extra) - 1) * model.config.router_aux_loss_coef * out.aux_loss
        loss.backward()
        outcome.values["loss"] = loss.detach().float().cpu()
        record("train", out)
        outcome.gradients = gradients_of(model, over_experts=case.routing == "ties")
        if case.checkpointing:
            model.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad():
            # with a cache, Transformers does not detect packed documents, and padding is not removed
            out = (call if case.batch == "packed" else model)(**batch, **extra, use_cache=case.batch != "packed")
        record("eval", out)
    return outcome


def aux_share(batch: dict) -> float:
    """Return this micro-batch's share of the router aux loss: its labeled tokens / `num_items_in_batch`."""
    if "num_items_in_batch" not in batch:
        return 1.0
    return float((batch["labels"][:, 1:] != -100).sum() / batch["num_items_in_batch"])


def errors(outcome: Outcome, reference: Outcome) -> dict[str, tuple[float, str]]:
    """Return {quantity: (relative error, where it is largest)}."""
    found = {name: (relative_error(value, reference.values[name]), "") for name, value in outcome.values.items()}
    found["gradients"] = worst_error(outcome.gradients, reference.gradients)
    return found


def noise(outcome: Outcome, exact: Outcome) -> dict[str, tuple[float, str]]:
    """Like `errors`, for bfloat16: root mean squares instead of maxima, and both mean and largest gradient error.

    A scalar may be exact by chance, so its error counts as at least that of the logits.
    """
    found = {name: (error, "") for name, error in rms_errors(outcome.values, exact.values).items()}
    floor = found["train logits"]
    found |= {name: max(found[name], floor) for name, value in exact.values.items() if value.numel() == 1}
    per_tensor = rms_errors(outcome.gradients, exact.gradients)
    worst = max(per_tensor, key=lambda name: per_tensor[name])
    found["gradients"] = sum(per_tensor.values()) / len(per_tensor), worst
    found["worst gradient"] = per_tensor[worst], worst
    return found


def applicable(case: Case, model: PreTrainedModel) -> bool:
    """Return whether the case applies to the model. Packed documents need mixers that can keep them separate."""
    if case.batch == "packed" and not all(map(supports_packing, model.modules())):
        return False
    if case.routing and not router_weights(model):
        return False
    has_aux_loss = "output_router_logits" in inspect.signature(type(model).forward).parameters
    if case.aux and not (has_aux_loss and hasattr(model.config, "router_aux_loss_coef") and router_weights(model)):
        return False
    return not case.checkpointing or model.supports_gradient_checkpointing


def compare_case(
    stock: PreTrainedModel, ours: PreTrainedModel, case: Case, reference: PreTrainedModel | None = None
) -> list[Row]:
    """Return the rows of one case. Without `reference`, ours must equal stock. With `reference` (stock in float32), our
    error against it may be at most a multiple of stock's. All models get their weights back if the routing was changed.
    """
    kept = {name: tensor.clone() for name, tensor in stock.state_dict().items()} if case.routing else {}
    others = [model for model in (ours, reference) if model is not None]
    if case.routing:
        bend_routing(stock, case.routing)
        for model in others:
            model.load_state_dict(stock.state_dict())
    try:
        per_document = needs_per_document(ours, case.batch)
        theirs = run_case(stock, case, aux_share, per_document)
        found = run_case(ours, case)
        if reference is None:
            return [
                Row(case.name, what, error, CPU_TOLERANCE, where)
                for what, (error, where) in errors(found, theirs).items()
            ]
        exact = run_case(reference, case, aux_share, per_document)
        own = noise(theirs, exact)
        # the largest error of many tensors, some with only four entries, is noisy itself
        ratio = dict.fromkeys(own, CUDA_RATIO) | {"worst gradient": 2 * CUDA_RATIO}
        return [
            Row(case.name, what, error, ratio[what] * own[what][0], where)
            for what, (error, where) in noise(found, exact).items()
        ]
    finally:
        if case.routing:
            for model in (stock, *others):
                model.load_state_dict(kept)


@torch.no_grad()
def generate_rows(stock: PreTrainedModel, ours: PreTrainedModel, new_tokens: int = 8) -> list[Row]:
    """Compare greedy decoding with a cache from a left-padded prompt: the tokens, and the logits of each step."""
    batch = make_batch("left", stock.config.get_text_config().vocab_size, stock.device)
    del batch["labels"]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
    theirs, found = (
        model.eval().generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
        for model in (stock, ours)
    )
    different = int((theirs.sequences != found.sequences).sum())
    logits = relative_error(torch.stack(found.logits), torch.stack(theirs.logits))
    return [
        Row("generate", "tokens", different, 0, ""),
        Row("generate", "logits of all steps", logits, CPU_TOLERANCE, ""),
    ]


def weight_rows(stock: PreTrainedModel, ours: PreTrainedModel) -> list[Row]:
    """Check that both models loaded the same tensors under the same names."""
    different = differing_tensors(ours.state_dict(), stock.state_dict())
    return [Row("load", "weights", len(different), 0, different[0] if different else "")]


def pooled(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield one row per quantity for all cases, with the root mean square of their errors and limits.

    In bfloat16 a near-tie of a router may flip on either side, so a single case of a small model depends on chance. NaN
    or infinity in one case still fails the check.
    """
    by_quantity: dict[str, list[Row]] = {}
    for row in rows:
        by_quantity.setdefault(row.quantity, []).append(row)
    for quantity, found in by_quantity.items():
        error, limit = (
            math.sqrt(sum(value**2 for value in values) / len(found))
            for values in ([row.error for row in found], [row.limit for row in found])
        )
        worst = max(found, key=lambda row: row.error)
        yield Row(f"{len(found)} cases together", quantity, error, limit, worst.where or worst.case)


def without_mtp(path: str | Path) -> dict[str, int]:
    """Return options that load no modules for multi-token prediction, as stock Transformers has none."""
    return {MTP_KEY: 0} if getattr(AutoConfig.from_pretrained(path), MTP_KEY, 0) else {}


def check_checkpoint(path: str | Path, device: str = "cpu") -> Iterator[Row]:
    """Compare stock Transformers and expertmesh on one checkpoint (a directory or a Hub id); yield rows one by one."""
    from expertmesh import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    place: dict = {"device_map": device} | without_mtp(path)
    stock = StockAutoModelForCausalLM.from_pretrained(path, dtype=dtype, **place)
    ours = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **place)
    reference = None
    if device != "cpu":
        reference = StockAutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **place)
    yield from weight_rows(stock, ours)
    compared = (compare_case(stock, ours, case, reference) for case in CASES if applicable(case, stock))
    if reference is None:
        yield from itertools.chain.from_iterable(compared)
        yield from generate_rows(stock, ours)
    else:
        yield from pooled(itertools.chain.from_iterable(compared))
    yield from export_rows(stock, ours)


@contextlib.contextmanager
def checkpoint_of(model: str) -> Iterator[str]:
    """Yield the checkpoint to compare: `model` itself, or for a family (`qwen3_moe`) that of a new tiny model."""
    if model not in FAMILIES:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(model).save_pretrained(folder)
        yield folder
