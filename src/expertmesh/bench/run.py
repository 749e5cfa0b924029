"""`expertmesh bench`: run the same models, weights, tokens and routing in every arm, one after the other.

    run(BenchOptions(works=("qwen3-30b-a3b",), arms=("stock", "expertmesh"), batches=(1, 4), out="NAME.json"))

First the proof (`parity`) runs, then each arm and batch size is timed; with `loops`, whole steps of trainers are timed
instead (loops.py). The file is written after every row, so an interrupted job keeps its measurements. If an arm fails,
for example because memory runs out, the failure is recorded, and the other arms still run.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expertmesh.bench import loops, profile, steps
from expertmesh.bench.arms import ARMS, DEFAULT, LIBRARIES, WITHOUT, Arm, fusions_of, model_of, why_not
from expertmesh.bench.flops import forward_flops, step_flops
from expertmesh.bench.gate import ROUTINGS, busiest, set_routing
from expertmesh.bench.loops import LOOPS
from expertmesh.bench.origin import origin
from expertmesh.bench.proof import Proof
from expertmesh.bench.works import WORKS, config_of, top_k_and_experts
from expertmesh.parallel.setup import current_world_size
from expertmesh.train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. `arms` None: all that can run. `loops`: whole steps of trainers. `layers` None: the default of
    the work. `ablate` adds expertmesh without each fusion that is on. `full`: with clipping and AdamW. `packed`: 14
    documents in each sequence. `device` None: the GPU if there is one. `warmup`, `repeats` None: 3, 7, in loops 6, 24.
    """

    works: tuple[str, ...] = ("qwen3-30b-a3b",)
    arms: tuple[str, ...] | None = None
    loops: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 4)
    seq: int = 4096
    layers: int | None = None
    routings: tuple[str, ...] = ("random-init",)
    tiny: bool = False
    device: str | None = None
    full: bool = False
    packed: bool = False
    ablate: bool = False
    proof: bool = True
    profile: bool = False
    warmup: int | None = None
    repeats: int | None = None
    out: str | None = None
    commit: str | None = None


def run(options: BenchOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, and return the result that is written to `out`. Call `say` with a line per measurement.

    Raise ConfigError for invalid options.

    Every row has "work", "arm", "layers", "batch", "seq", "routing" and the measurements, which are None if they need
    a GPU. Rows of loops have "loop" and the result of `loops.measure`. "failed" lists failures with their errors.
    On several ranks each returns its own times; rank 0 prints and writes.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    refuse(options, device)
    if current_world_size() > 1 and int(os.environ["RANK"]):
        options, say = dataclasses.replace(options, out=None), _silence
    if current_world_size() > 1 and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    plan = {name: list(_arms(name, options, device, say)) for name in options.works}
    result = _heading(options, device)
    for name, arms in plan.items():
        bench = _Bench(options, device, name, result, say)
        for loop, batch, arm in itertools.product(options.loops, options.batches, arms):
            bench.train(arm, loop, batch)
        if options.loops:
            continue
        if options.proof:
            bench.prove(arms)
        for routing in options.routings:
            for arm in arms:
                bench.time(arm, routing)
    if current_world_size() > 1 and dist.is_initialized():
        dist.destroy_process_group()
    return result


def _silence(line: str) -> None:
    """Replace `say` on all ranks but the first."""


def refuse(options: BenchOptions, device: str) -> None:
    """Raise ConfigError for invalid names and numbers."""
    for work in options.works:
        check_choice("--work", work, list(WORKS))
    for arm in options.arms or ():
        check_choice("--arms", arm, list(ARMS))
    for routing in options.routings:
        check_choice("--routing", routing, ROUTINGS)
    for loop in options.loops:
        check_choice("--loop", loop, list(LOOPS))
    _refuse_loops(options, device)
    for work in options.works if "balanced" in options.routings else ():
        top_k, experts = top_k_and_experts(config_of(WORKS[work], options.layers, options.tiny))
        for batch in options.batches:
            if batch * options.seq * top_k % experts:
                raise ConfigError(
                    f"A balanced gate gives each of the {experts} experts of {work} the same number of rows, but "
                    f"{batch} x {options.seq} tokens x {top_k} cannot be divided so: change --batch or --seq."
                )
    if options.packed and options.seq % 64:
        raise ConfigError(
            f"Lengths of packed documents are in 64ths of a sequence: --seq {options.seq} is not divisible."
        )
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is cpu or cuda, not {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device: use --device cpu --tiny.")
    if device == "cpu" and not options.tiny:
        raise ConfigError("On the CPU the bench runs tiny models only: add --tiny.")


def _refuse_loops(options: BenchOptions, device: str) -> None:
    """Raise ConfigError for options that cannot be combined with --loop, or that need it."""
    if not options.loops:
        for name in options.arms or ():
            if ARMS[name].trainer or ARMS[name].four_bit:
                raise ConfigError(f"{name} is an arm of people's loops: add --loop {', '.join(LOOPS)}.")
        if current_world_size() > 1:
            raise ConfigError("On several ranks the bench runs people's loops only: add --loop trainer.")
        return
    for asked, option, instead in (
        (options.packed, "--packed", "--loop sft-packed has packed rows"),
        (options.full, "--step", "a loop runs whole steps anyway"),
        (options.profile, "--profile", "it looks into forward and backward, which no loop calls apart"),
        (options.ablate and current_world_size() > 1, "--ablate", "several ranks have the whole of ours only"),
        (options.routings != BenchOptions.routings, "--routing", "routers learn in a loop"),
    ):
        if asked:
            raise ConfigError(f"Leave {option} out with --loop: {instead}.")
    loops.refuse(options.loops, options.arms or (), options.seq, device)


def _arms(name: str, options: BenchOptions, device: str, say: Callable[[str], None]) -> Iterable[Arm]:
    """Yield the arms of one work, in order. An arm that cannot run is an error if named, else skipped and logged."""
    config = config_of(WORKS[name], options.layers, options.tiny)
    for asked in options.arms or (loops.default_arms() if options.loops else DEFAULT):
        reason = why_not(ARMS[asked], config, device)
        if reason is None:
            yield ARMS[asked]
        elif options.arms:
            raise ConfigError(f"{asked} cannot run {name} here: {reason}")
        else:
            say(f"{name}: without {asked}: {reason}")
    if options.ablate:
        for without in (*(row.name for row in fusions_of(config) if row.on), *LIBRARIES):
            arm = ARMS[f"{WITHOUT}{without}"]
            if arm.name not in (options.arms or ()) and why_not(arm, config, device) is None:
                yield arm


class _Bench:
    """The measurements of one work. They are added to `result`, which is written to the output file."""

    def __init__(
        self, options: BenchOptions, device: str, name: str, result: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.options, self.device, self.name, self.result, self.say = options, device, name, result, say
        self.work = WORKS[name]
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.attention = None if device == "cpu" else self.work.attention
        self.warmup = options.warmup or (loops if options.loops else steps).WARMUP
        self.repeats = options.repeats or (loops if options.loops else steps).REPEATS
        self.weights: dict[str, dict[str, int]] = {}  # by routing
        self.loads: dict[tuple[str, int], float] = {}  # by routing and batch

    def prove(self, arms: list[Arm]) -> None:
        """Compare stock and these arms with the float32 reference, and store the errors in `result`."""
        proof = Proof(self.work, self.device, 64 if self.options.tiny else 2048, self.options.tiny)
        for arm in dict.fromkeys((ARMS["stock"], *arms)):
            with self._recording_failure(arm, "proof"):
                found = proof.compare(arm)
                self.result["parity"].setdefault(self.name, {})[arm.name] = found
                worst = f", worst gradient {found['worst_ratio']:.2f}x stock's" if "worst_ratio" in found else ""
                self.say(f"{self.name}: {arm.name}: loss off by {found['loss_error']:.1e} from float32{worst}")

    def train(self, arm: Arm, name: str, batch: int) -> None:
        """Add the row of one arm and batch size in one loop."""
        options, loop = self.options, LOOPS[name]
        what = f"{name}, {batch} x {options.seq}"
        reason = loops.why_not(loop, arm)
        if reason is not None:
            return self.say(f"{self.name}: {name} without {arm.name}: {reason}")
        with self._recording_failure(arm, what):
            config = loops.loop_config(self.work, options.layers, options.tiny)
            with loops.loop_model(arm, config, self.dtype, self.device, self.attention) as model:
                if current_world_size() == 1 and not arm.four_bit:
                    self._same_weights(arm, model, "random-init")
                found = loops.measure(loop, arm, model, batch, options.seq, self.warmup, self.repeats)
            row = {"work": self.name, "loop": name, "arm": arm.name, "layers": config.num_hidden_layers}
            row |= {"batch": batch, "seq": options.seq, "routing": "random-init", **found}
            self.result["rows"].append(row)
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            self.say(
                f"{self.name}: {arm.name}, {what}: step {row['step_ms']} ms, {row['tokens_per_second']:,} tokens/s, "
                f"{row['peak_gib']} GiB, losses {losses}"
            )

    def time(self, arm: Arm, routing: str) -> None:
        """Add the rows of one arm, one per batch size."""
        batches = self.options.batches
        # recompile for each batch size: code compiled for varying shapes is slower
        for group in [(batch,) for batch in batches] if arm.compiled else [batches]:
            with self._recording_failure(arm, routing):
                self._time(arm, routing, group)

    def _time(self, arm: Arm, routing: str, batches: tuple[int, ...]) -> None:
        config = config_of(self.work, self.options.layers, self.options.tiny)
        with model_of(arm, config, self.dtype, self.device, self.attention) as model:
            set_routing(model, routing, top_k_and_experts(config)[0])
            self._same_weights(arm, model, routing)
            for batch in batches:
                self._row(arm, model, routing, batch)
                self._write()

    @contextmanager
    def _recording_failure(self, arm: Arm, what: str) -> Iterator[None]:
        steps.release()
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            self.result["failed"].append({"work": self.name, "arm": arm.name, "what": what, "error": text})
            self.say(f"{self.name}: {arm.name}, {what}: FAILED: {text}")
        self._write()

    def _row(self, arm: Arm, model: Any, routing: str, batch: int) -> None:
        options, config = self.options, model.config
        step = steps.Step(model, batch, options.seq, options.full, arm.ours, options.packed)
        found = steps.measure(step, self.warmup, self.repeats)
        lengths = steps.documents(options.seq, options.packed)
        flops = sum(step_flops(config, batch, length) for length in lengths)
        waits = steps.host_syncs(step)
        both_ms = found["forward_ms"] + found["backward_ms"]
        tflops = flops / both_ms / 1e9
        row = {
            "work": self.name,
            "arm": arm.name,
            "layers": config.num_hidden_layers,
            "batch": batch,
            "seq": options.seq,
            "documents": len(lengths),
            "routing": routing,
            **found,
            "tokens_per_second_per_gpu": round(batch * options.seq / found["step_ms"] * 1e3),
            "tflops_per_gpu": round(tflops, 4 if options.tiny else 1),
            "percent_of_gemm": round(100 * tflops / self.result["ceilings"]["gemm_tflops"], 1),
            "host_syncs": None if waits is None else len(waits),
            "launches": steps.count_launches(step),
            "busiest": self._busiest(arm, step, routing),
        }
        self.result["rows"].append(row)
        self.say(
            f"{self.name}: {arm.name}, {routing}, {batch} x {options.seq}: forward {row['forward_ms']} backward "
            f"{row['backward_ms']} step {row['step_ms']} ms, {row['tokens_per_second_per_gpu']:,} tokens/s, "
            f"{row['peak_gib']} GiB, {row['host_syncs']} host syncs, {row['launches']} launches"
        )
        if arm.ours and waits:
            self.say(f"  the CPU waited for the GPU at {', '.join(dict.fromkeys(waits))}")
        if options.profile and batch == options.batches[-1] and not arm.compiled:
            self._profile(arm, step, routing, both_ms, lengths)

    def _profile(self, arm: Arm, step: steps.Step, routing: str, both_ms: float, lengths: list[int]) -> None:
        batch, seq = step.inputs["input_ids"].shape
        rates = self.result["ceilings"]
        flops: dict[str, float] = defaultdict(float)
        for length in lengths:
            for component, needed in forward_flops(step.model.config, batch, length).items():
                flops[component] += needed
        limits = profile.floors(step.model, flops, batch * seq)
        rows = []
        for component, (ms, launches) in profile.by_component(step).items():
            floor = limits.get(component, profile.Floor("0: could be fused into its neighbours"))
            least = floor.flops / rates["gemm_tflops"] / 1e9 + floor.bytes / rates["copy_tb_per_s"] / 1e9
            rows.append(
                {
                    "component": component,
                    "ms": round(ms, 3),
                    "floor_ms": round(least, 3),
                    "launches": launches,
                    "floor": floor.formula,
                }
            )
        rows.sort(key=lambda row: -row["ms"])
        found = {
            "batch": batch,
            "seq": seq,
            "layers": step.model.config.num_hidden_layers,
            "forward_and_backward_ms": round(both_ms, 2),
            "components": rows,
        }
        self.result["profiles"].setdefault(f"{self.name}, {routing}", {})[arm.name] = found
        for row in rows:
            self.say(f"  {row['ms']:9.2f} ms, floor {row['floor_ms']:8.2f}, x{row['launches']:<5} {row['component']}")

    def _same_weights(self, arm: Arm, model: Any, routing: str) -> None:
        """Assert that the arm has the first arm's weights, bit for bit."""
        sums = {name: _bits(tensor) for name, tensor in model.named_parameters()}
        first = self.weights.setdefault(routing, sums)
        different = sorted(name for name in sums.keys() | first.keys() if sums.get(name) != first.get(name))
        assert not different, f"{arm.name} of {self.name} has other weights than the arms before it: {different[:3]}"

    def _busiest(self, arm: Arm, step: steps.Step, routing: str) -> float | None:
        """Return the load, measured in the first arm that is not compiled, as hooks cause recompilation."""
        key = (routing, len(step.inputs["input_ids"]))
        if key not in self.loads and not arm.compiled:
            self.loads[key] = round(busiest(step.model, step.inputs), 2)
        return self.loads.get(key)

    def _write(self) -> None:
        if self.options.out:
            path = Path(self.options.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.result, indent=1))


def _bits(tensor: torch.Tensor) -> int:
    """Return a checksum of the tensor's bits."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return int(tensor.detach().view(kind).sum(dtype=torch.int64))


def _heading(options: BenchOptions, device: str) -> dict[str, Any]:
    """Return the result without rows: hardware, versions, commit, command and the device's measured rates."""
    ranks = current_world_size()
    start = ["expertmesh"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks), "-m", "expertmesh.cli"]
    packages = ("triton", "transformers", "mamba-ssm", *(("trl", "peft") if options.loops else ()))
    return {
        **origin([*start, *sys.argv[1:]], options.commit, packages),
        **({"hardware": "CPU", "gpus": 0} if device == "cpu" else {"gpus": ranks}),
        "ceilings": {
            "gemm_tflops": round(steps.gemm_tflops(device), 3),
            "copy_tb_per_s": round(steps.copy_tb_per_second(device), 3),
        },
        "rows": [],
        "parity": {},
        "profiles": {},
        "failed": [],
    }
