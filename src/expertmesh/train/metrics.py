"""Write and read metrics.jsonl, which has every record that a run logs, one JSON object per line.

Each line has `step`, `time` (seconds since 1970) and everything that transformers, TRL and expertmesh's Trainer log.
Training records have the router metrics of each layer as `moe_layers`.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from expertmesh.train.routing import RouterLoad, layer_metrics

log = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Append log records to the file. A new run replaces the file; a resumed run drops what followed its checkpoint."""

    def __init__(self, folder: str | Path, load: RouterLoad):
        self.path = Path(folder) / "metrics.jsonl"
        self.load = load
        self.old = read_metrics(self.path)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [record for record in self.old if record["step"] <= state.global_step] if state.global_step else []
        records = kept + read_metrics(self.path)[len(self.old) :]
        new = self.path.with_name(f".{self.path.name}")
        new.write_text("".join(json.dumps(record) + "\n" for record in records))
        new.replace(self.path)  # atomic: if the process is killed while it writes, the old file is intact
        self.old = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        record: dict[str, Any] = {"step": state.global_step, "time": round(time.time(), 3)} | (logs or {})
        # JSON has neither nan nor infinity: write null
        record = json.loads(json.dumps(record, default=lambda x: x.item()), parse_constant=lambda _: None)
        if "moe/load_cv" in record and self.load.last is not None:
            layers = layer_metrics(self.load.last, self.load.ranks)
            record["moe_layers"] = {key: [round(x, 5) for x in values.tolist()] for key, values in layers.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, [] if the file does not exist.

    Skip a last line that a crash cut short. Also skip other damaged lines, with a warning that names them.
    """
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    records, damaged = list[dict[str, Any]](), list[str]()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError):  # no JSON, no record, no step
            damaged.append(str(number))
    if damaged:
        log.warning("%s is damaged: it is read without line %s.", path, ", ".join(damaged))
    return records
