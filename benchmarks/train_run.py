"""A run of `expertmesh train` as a row: its step, memory and losses, beside what its plan said.

    python benchmarks/train_run.py --out benchmarks/results/h200_train_30b.json
    python benchmarks/train_run.py --keys train.per_device_train_batch_size=2 --out ...

examples/one-gpu-full.yaml with Qwen3-30B-A3B's widths, random weights, and text that every machine has
(offline_inputs.py), each row cut to 4,096 tokens; `--keys` change it. The step is the median of the wall clock between
records, without the first steps, which compile. The folder of the run stays in `--folder`.
"""

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from offline_inputs import write_model, write_text
from shared import Result, parser

from expertmesh import cli
from expertmesh.train.config import Config, load_config
from expertmesh.train.metrics import read_metrics

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "one-gpu-full.yaml"
WORK = "qwen3-30b-a3b"
WARM_UP = 3  # steps


def row_of(config: Config, layers: int) -> dict[str, Any]:
    """What the metrics of a finished run say. The arm is how gradients are released."""
    records = read_metrics(Path(config.save.output_dir) / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    times = [record["time"] for record in steps[WARM_UP:]]
    seconds = statistics.median(after - before for before, after in pairwise(times))
    beside = next((record for record in records if "planned/step_ms" in record), {})
    planned = {key.replace("/", "_"): beside[key] for key in ("planned/step_ms", "planned/peak_gib") if key in beside}
    batch, seq = config.train.per_device_train_batch_size, config.data.max_length
    assert isinstance(batch, int)
    return {
        "work": WORK,
        "loop": "train",
        "arm": config.train.gradient_release or "ordinary",
        "layers": layers,
        "batch": batch,
        "seq": seq,
        "step_ms": round(seconds * 1e3, 2),
        "tokens_per_second": round(batch * seq / seconds),
        "peak_gib": beside.get("measured/peak_gib"),
        **planned,
        "losses": [round(record["loss"], 4) for record in steps],
    }


def main() -> None:
    """Make the inputs, train, and write the row."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--keys", nargs="*", default=[], help="keys of the configuration, as key.sub=value")
    options.add_argument("--folder", type=Path, help="default: one that is removed")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        layers = 1 if options.tiny else options.layers
        write_model(folder / "model", WORK, layers, options.tiny)
        write_text(folder / "text.jsonl", *((400, 24) if options.tiny else (20_000, None)))
        keys = [f"model.name={folder}/model", f"data.name={folder}/text.jsonl", "data.packing=false"]
        keys += ["log.logging_steps=1", f"save.output_dir={folder}/run", *options.keys]
        if code := cli.run(["train", str(EXAMPLE), *keys]):
            raise SystemExit(code)
        config = load_config(folder / "run" / "config.yaml")
        settings = {"recompute": config.train.activation_checkpointing, "states": config.train.optim_states}
        settings["offload"] = config.train.optim_offload
        result = Result(options, layers=layers, seq=config.data.max_length, **settings)
        result.add(row_of(config, layers))


if __name__ == "__main__":
    main()
