"""The GPUs that a run can be planned for: memory, FLOP/s and bandwidths.

An H200's figures are measured (benchmarks/results: `ceilings` of the runs, h200_x2_exchanges.json). Other GPUs are
assumed to reach the H200's share of their data sheet: 78 % of dense bfloat16, 87 % of memory bandwidth, two thirds of
one direction of NVLink. A card without NVLink gets the bandwidth of PCIe 4.0 between two GPUs. `host` is assumed for
all: four fifths of PCIe 5.0 or 4.0 with 16 lanes.
"""

import re
from dataclasses import dataclass, replace

from expertmesh import backends

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """memory: bytes reported by CUDA. flops: FLOP/s of dense bfloat16 GEMMs. copies: bytes read or written per second.
    wire: bytes sent per second within the node. network: the same to other nodes, assumed: 4/5 of a 400 Gbit/s adapter
    per GPU. host: the same to or from pinned host memory. measured: whether all but network and host were measured.
    """

    name: str
    memory: int
    flops: float
    copies: float
    wire: float
    measured: bool = False
    network: float = 40e9
    host: float = 50e9


GPUS = {
    "h200": GPU("h200", int(139.8 * GIB), 775e12, 4.2e12, 300e9, measured=True),
    "h100-80gb": GPU("h100-80gb", int(79.1 * GIB), 775e12, 2.9e12, 300e9),
    "b200": GPU("b200", int(178.0 * GIB), 1750e12, 7.0e12, 600e9),
    "a100-80gb": GPU("a100-80gb", int(79.2 * GIB), 243e12, 1.77e12, 200e9, host=25e9),
    "rtx-4090": GPU("rtx-4090", int(23.5 * GIB), 129e12, 0.88e12, 20e9, host=25e9),
}


def gpu_here() -> GPU | None:
    """Return this machine's GPU with its actual memory, or None. Raise ValueError for a kind that is not in `GPUS`."""
    if (detected := backends.gpu()) is None:
        return None
    name, memory = detected
    words = set(re.split(r"\W+", name.lower()))
    for kind, gpu in GPUS.items():
        if {word for word in kind.split("-") if not word.endswith("gb")} <= words and "mig" not in words:
            return replace(gpu, memory=memory)
    raise ValueError(f"no rates are known of this machine's {name}, only of {', '.join(GPUS)}")
