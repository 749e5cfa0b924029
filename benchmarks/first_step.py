"""How long the first training step of each family takes: with nothing compiled yet, and again from the disk cache.

    python benchmarks/first_step.py --out benchmarks/results/NAME.json

Each is a process of its own, `expertmesh bench` with two steps of a few layers that have all kinds of the family's; the
first of two has empty caches of Triton, quack and flash-attn-4. A step's wall time begins when the model stands:
forward and backward, compilation included. `--at-once` runs families at the same time: a compiler takes one core, all
of them one GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from expertmesh.bench.origin import origin, write

CACHES = "TRITON_CACHE_DIR", "QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
LAYERS = {"qwen3-30b-a3b": 2, "nemotron-3-nano": 6, "gpt-oss-20b": 2, "deepseek-v3": 2}


def measured(folder, options, work):
    """The rows of a process with an empty cache, and of the next."""
    rows = []
    for cache in ("empty", "warm"):
        out = folder / f"{work}-{cache}.json"
        command = [sys.executable, "-m", "expertmesh", "bench", "--work", work, "--arms", "expertmesh"]
        command += ["--layers", str(LAYERS[work]), "--batch", "1", "--warmup", "1", "--repeats", "1", "--out", str(out)]
        command += ["--no-proof", "--commit", options.commit, *(["--tiny", "--seq", "64"] if options.tiny else [])]
        caches = {name: str(folder / work / name.lower()) for name in CACHES}
        done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
        row = {"work": work, "layers": LAYERS[work], "cache": cache, "at_once": options.at_once}
        if done.returncode:
            rows.append(row | {"failed": f"{done.stderr}{done.stdout}"[-400:]})
        else:
            first = json.loads(out.read_text())["rows"][0]
            rows.append(row | {key: first[key] for key in ("batch", "seq", "first_step_s")})
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--at-once", type=int, default=1, help="families at the same time")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try this")
    parser.add_argument("--caches", help="keep the caches in this new folder")
    parser.add_argument("--out")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    folder = Path(options.caches or tempfile.mkdtemp()).resolve()
    with ThreadPoolExecutor(options.at_once) as pool:
        found = pool.map(partial(measured, folder, options), options.works)
        rows: list[dict] = []
        for pair in found:
            rows += pair
            write(origin(["python", *sys.argv], options.commit) | {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
