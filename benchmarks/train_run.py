"""Measure a run of `expertmesh train`: step time, memory and losses, compared with its plan.

    python benchmarks/train_run.py --out benchmarks/results/h200_train_30b.json
    python benchmarks/train_run.py --keys train.per_device_train_batch_size=2 train.gradient_release=exact --out ...
    python benchmarks/train_run.py --folder runs/offline --inputs-only      # writes the model's folder and the text
    python benchmarks/train_run.py --work gpt-oss-20b --layers 36 --widths '{"num_local_experts": 128}' --keys ...

The run is examples/one-gpu-full.yaml with Qwen3-30B-A3B's widths, random weights, and the sources of Python's standard
library as text, each row truncated to 4,096 tokens. `--keys` override its configuration. The built-in tokenizer's
vocabulary is smaller than the model's. The step time is the median wall-clock time between log records, without the
first steps, which compile. With `--folder` the folder of the run is kept.
"""

import json
import statistics
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared import Result, parser

from expertmesh import cli
from expertmesh.bench.works import WORKS, config_of
from expertmesh.data import demo_tokenizer
from expertmesh.train.config import Config, load_config
from expertmesh.train.metrics import read_metrics

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "one-gpu-full.yaml"
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
WARM_UP = 3  # steps


def write_inputs(folder: Path, work: str, layers: int, widths: dict[str, int], tiny: bool) -> None:
    """Write model/config.json with a published model's widths and these changes, a tokenizer, and text.jsonl, whose
    rows are long enough to have more than 4,096 tokens.
    """
    tokenizer = demo_tokenizer()
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    changes = tokens | ({"vocab_size": len(tokenizer)} if tiny else {}) | widths
    config_of(WORKS[work], layers, tiny, dtype="bfloat16", **changes).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]
    text = "".join(path.read_text("utf-8", errors="ignore") for path in sources)
    characters, limit = (400, 24) if tiny else (20_000, None)
    starts = range(0, len(text) - characters + 1, characters)[:limit]
    lines = [json.dumps({"text": text[i : i + characters]}) + "\n" for i in starts]
    (folder / "text.jsonl").write_text("".join(lines))


def row_of(config: Config, work: str, layers: int) -> dict[str, Any]:
    """Return the row of a finished run from its metrics. The arm is the kind of gradient release."""
    records = read_metrics(Path(config.save.output_dir) / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    times = [record["time"] for record in steps[WARM_UP:]]
    seconds = statistics.median(after - before for before, after in pairwise(times))
    beside = next((record for record in records if "planned/step_ms" in record), {})
    planned = {key.replace("/", "_"): beside[key] for key in ("planned/step_ms", "planned/peak_gib") if key in beside}
    batch, seq = config.train.per_device_train_batch_size, config.data.max_length
    assert isinstance(batch, int)
    arm = config.train.gradient_release or "ordinary"
    row = {"work": work, "loop": "train", "arm": arm, "layers": layers, "batch": batch, "seq": seq}
    row |= {"step_ms": round(seconds * 1e3, 2), "tokens_per_second": round(batch * seq / seconds)}
    losses = [round(record["loss"], 4) for record in steps]
    return row | {"peak_gib": beside.get("measured/peak_gib"), **planned, "losses": losses}


def main() -> None:
    """Make the inputs, train, and write the row."""
    options = parser(__doc__)
    options.add_argument("--work", choices=WORKS, default="qwen3-30b-a3b")
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--widths", type=json.loads, default={}, help="JSON of configuration values to override")
    options.add_argument("--keys", nargs="*", default=[], help="keys of the configuration, as key.sub=value")
    options.add_argument("--folder", type=Path, help="default: a temporary one")
    options.add_argument("--inputs-only", action="store_true")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, layers = options.folder or Path(made), 1 if options.tiny else options.layers
        write_inputs(folder, options.work, layers, options.widths, options.tiny)
        if options.inputs_only:
            return
        keys = [f"model.name={folder}/model", f"data.name={folder}/text.jsonl", "data.packing=false"]
        keys += ["log.logging_steps=1", f"save.output_dir={folder}/run", *options.keys]
        if code := cli.run(["train", str(EXAMPLE), *keys]):
            raise SystemExit(code)
        config = load_config(folder / "run" / "config.yaml")
        settings = {"recompute": config.train.activation_checkpointing, "states": config.train.optim_states}
        settings["offload"] = config.train.optim_offload
        result = Result(options, layers=layers, seq=config.data.max_length, **settings)
        result.add(row_of(config, options.work, layers))


if __name__ == "__main__":
    main()
