"""Profile a step: device time summed by component of the layer, and the minimum (floor) of each component.

A kernel's name alone does not identify its component, so each kernel is attributed to a module. The profiler
gives the operator that launched it. In the forward, hooks open a named range around each module. In the backward, the
operator's autograd node has the sequence number of the forward operator that created it. `RULES` then maps (module,
operator, kernel) to a component. On the CPU, operators are used instead of kernels.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, record_function
from transformers import PreTrainedModel

from expertmesh.bench.steps import Step
from expertmesh.bench.works import expert_widths, top_k_and_experts

RANGE = "module: "  # prefix of the ranges' names
NODE = "autograd::engine::evaluate_function: "

# (component, classes of the modules from the outermost inwards, "forward" or "backward" + operator + kernel).
# The first match counts.
RULES = [
    (component, re.compile(module), re.compile(what))
    for component, module, what in (
        ("attention core", r"Attention$", r"flash|fmha|sdpa|scaled_dot|flex|softmax|bmm|cudnn"),
        ("attention linears", r"Attention/Linear$", r""),
        ("norms, RoPE", r"Norm$|Rotary|Attention", r""),
        ("router", r"Router$", r""),
        ("combine", r"Experts", r"_combine_kernel|_unsort_kernel"),
        ("grouping", r"Experts", r"_count_kernel|_place_kernel|_tile_kernel|sort|histc|cumsum|searchsorted"),
        # quack's kernels all have one name; the up-projection's backward starts with the gradient of its input
        ("experts dgrads", r"Experts", r"down_dact|backward.*_grouped_gemm|backward _Up\w* first .*quack"),
        ("experts wgrads", r"Experts", r"wgrad|grouped_sum|grouped_mm 2x2|backward .*quack"),
        ("experts dgrads", r"Experts", r"backward.*grouped_mm"),
        ("experts up", r"Experts", r"_up_act|grouped_mm 2x3 up|forward _Up\b.*quack"),
        ("experts down", r"Experts", r"_grouped_gemm|grouped_mm 2x3 down|forward .*quack"),
        ("experts: gather, activation, scatter", r"Experts", r""),
        ("Mamba2 linears", r"Mamba\w*/Linear$", r""),
        ("Mamba2 scan", r"Mamba", r""),
        ("other MLPs", r"MLP|Mlp", r""),
        ("other MLPs", r"(MoE|MoeBlock)/Linear$", r""),
        ("loss head", r"ForCausalLM(/Linear)?$", r""),
        ("norms, RoPE", r"", r"RMSNorm|_norm_forward|_norm_backward"),
        ("embedding", r"Embedding$", r""),
        ("clip and optimizer", r"^$", r"forward .*(foreach|adam|vector_norm)"),
        ("residual adds and the rest", r"", r""),
    )
]


@dataclass(frozen=True)
class Floor:
    """The minimum of a component: `flops` at the measured rate of matrix products, or `bytes` at that of copies."""

    formula: str
    flops: float = 0.0
    bytes: float = 0.0


def floors(model: PreTrainedModel, flops: dict[str, float], tokens: int) -> dict[str, Floor]:
    """Return the floor of every component of one bfloat16 step.

    flops: `forward_flops` of the model for this number of tokens. In the formulas, T is the tokens, H the hidden size,
    S the rows of all experts (T x K per layer with experts), F the component's FLOPs of a forward.
    """
    config: Any = model.config
    hidden = config.hidden_size
    top_k, experts = top_k_and_experts(config)
    moe_layers = flops["router"] / (2 * tokens * hidden * experts)
    norms: list[Any] = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    wide_norms = sum(norm.weight.numel() == hidden for norm in norms)
    rotated = 0.0
    if any(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules()):
        key_heads = 1 if hasattr(config, "kv_lora_rank") else config.num_key_value_heads
        rotated = config.num_hidden_layers * tokens * (config.num_attention_heads + key_heads) * config.head_dim
    found = {
        "attention core": Floor("3.5 F (2 products forward, 5 backward)", 3.5 * flops.get("attention core", 0.0)),
        "norms, RoPE": Floor(
            "2 bytes x (8 TH per norm with its residual add + 5 per rotated element)",
            bytes=2 * (wide_norms * 8 * tokens * hidden + 5 * rotated),
        ),
        "router": Floor("2 bytes x 3 TH per layer", bytes=2 * moe_layers * 3 * tokens * hidden),
        "grouping": Floor("16 bytes x S", bytes=16 * moe_layers * tokens * top_k),
        "experts up": Floor("F", flops["experts up"]),
        "experts down": Floor("F", flops["experts down"]),
        "experts dgrads": Floor("F of up + down", flops["experts up"] + flops["experts down"]),
        "experts wgrads": Floor("F of up + down", flops["experts up"] + flops["experts down"]),
        "embedding": Floor("2 bytes x (4 TH + VH, its gradient)", bytes=2 * hidden * (4 * tokens + config.vocab_size)),
        "clip and optimizer": Floor("2 bytes x 10 per parameter", bytes=20 * model.num_parameters()),
        "combine": Floor("2 bytes x 2 (S + T) H", bytes=4 * moe_layers * tokens * (top_k + 1) * hidden),
    }
    for component in ("attention linears", "Mamba2 linears", "Mamba2 scan", "other MLPs", "loss head"):
        found[component] = Floor("3 F", 3 * flops.get(component, 0.0))
    return found


def by_component(step: Step) -> dict[str, tuple[float, int]]:
    """Return {component: (ms, launches)} of one step."""
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with module_ranges(), torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step.run()
        if on_gpu:
            torch.cuda.synchronize()
    sums: dict[str, tuple[float, int]] = {}
    up = expert_widths(step.model.config)
    for module, what, microseconds in _traced(list(profiler.events()), on_gpu, up):
        component = next(name for name, where, which in RULES if where.search(module) and which.search(what))
        ms, launches = sums.get(component, (0.0, 0))
        sums[component] = ms + microseconds / 1e3, launches + 1
    return sums


@contextmanager
def module_ranges() -> Iterator[None]:
    """Context manager in which a profile shows each module's forward as a range named by its class.

    The hooks are global because a module with hooks of its own is not fused into its neighbors.
    """
    opened = []

    def enter(module: Any, args: Any) -> None:
        opened.append(record_function(f"{RANGE}{type(module).__name__}"))
        opened[-1].__enter__()

    def leave(module: Any, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _traced(events: list[Any], on_gpu: bool, up: tuple[int, int]) -> Iterator[tuple[str, str, float]]:
    """Yield (classes of the modules, "forward" or "backward" + operator + kernel, microseconds) of all work. The first
    kernel of an operator is marked by "first".
    """
    made: dict[int, Any] = {}  # sequence number of an autograd node -> the forward operator that created it
    for event in events:
        if event.device_type == DeviceType.CPU and event.sequence_nr >= 0 and _node(event) is None:
            made[event.sequence_nr] = event  # events are in order of their start: the last one is the innermost
    # the kernels that ran on the GPU, without the named ranges, which its timeline and `kernels` also contain
    on_device = (event.name for event in events if event.device_type == DeviceType.CUDA)
    left = Counter(name for name in on_device if not name.startswith(RANGE))
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        node = _node(event)
        source = event if node is None else made.get(node.sequence_nr)
        module = "/".join(reversed([up.name.removeprefix(RANGE) for up in _chain(source) if up.name.startswith(RANGE)]))
        what = f"{'forward' if node is None else 'backward'} {_operator(event, up)}"
        if on_gpu:
            for number, kernel in enumerate(event.kernels):
                if not left[kernel.name]:
                    continue
                left[kernel.name] -= 1
                yield module, f"{what}{' first' * (number == 0)} {kernel.name}", kernel.duration
        elif not event.name.startswith(RANGE):
            yield module, what, event.self_cpu_time_total
    for event in events if on_gpu else ():
        if event.device_type == DeviceType.CUDA and left[event.name]:  # launched outside of any operator
            left[event.name] -= 1
            yield "", event.name, event.time_range.elapsed_us()


def _chain(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _node(event: Any) -> Any:
    """Return the autograd node of an event in the backward, or None in the forward."""
    return next((up for up in reversed(list(_chain(event))) if up.name.startswith(NODE)), None)


def _operator(event: Any, up: tuple[int, int]) -> str:
    """Return the operator's name; for grouped products also the ranks of both operands, and "up" or "down" by width."""
    if "grouped_mm" not in event.name:
        return event.name
    left, right = event.input_shapes[:2]
    return f"{event.name} {len(left)}x{len(right)} {'up' if (left[-1], right[-1]) == up else 'down'}"
