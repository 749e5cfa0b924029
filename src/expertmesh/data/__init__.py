"""Training data: sources, row formats, the held-out split, and which tokens are supervised."""

from expertmesh.data.labels import IGNORED, REMEDY
from expertmesh.data.sources import Unreachable, hold_out, load_dataset
from expertmesh.data.tokenizer import DEMO_FOLDER, demo_config, demo_tokenizer

__all__ = [
    "DEMO_FOLDER",
    "IGNORED",
    "REMEDY",
    "Unreachable",
    "demo_config",
    "demo_tokenizer",
    "hold_out",
    "load_dataset",
]
