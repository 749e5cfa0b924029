"""How long the first training step of each family takes: with nothing compiled yet, and again from the disk cache.

    python benchmarks/first_step.py --out benchmarks/results/h200_first_step.json

Each is a process of its own: `expertmesh bench` with two steps of a few layers, at least one of each kind that the
family has. The first of two processes has empty caches of Triton, quack-kernels and flash-attn-4. The wall time is that
of forward and backward, compilation included; building the model does not count.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared import Result, parser

CACHES = "TRITON_CACHE_DIR", "QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
LAYERS = {"qwen3-30b-a3b": 2, "nemotron-3-nano": 6, "gpt-oss-20b": 2, "deepseek-v3": 2}


def first_step(folder: Path, options: Any, work: str, cache: str) -> dict[str, Any]:
    """The row of one process."""
    out = folder / f"{work}-{cache}.json"
    command = [sys.executable, "-m", "expertmesh", "bench", "--work", work, "--arms", "expertmesh"]
    command += ["--layers", str(LAYERS[work]), "--batch", "1", "--warmup", "1", "--repeats", "1", "--out", str(out)]
    command += ["--no-proof", "--commit", options.commit, *(["--tiny", "--seq", "64"] if options.tiny else [])]
    caches = {name: str(folder / work / name.lower()) for name in CACHES}
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    row = {"work": work, "layers": LAYERS[work], "cache": cache}
    if done.returncode:
        return row | {"failed": f"{done.stderr}{done.stdout}"[-400:]}
    found = json.loads(out.read_text())["rows"][0]
    return row | {key: found[key] for key in ("batch", "seq", "first_step_s")}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--works", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    options = options.parse_args()
    result = Result(options)
    with tempfile.TemporaryDirectory() as folder:
        for work in options.works:
            for cache in ("empty", "warm"):
                result.add(first_step(Path(folder), options, work, cache))


if __name__ == "__main__":
    main()
