"""The names a NeMo AutoModel script imports, so that it moves here by its import lines."""

from expertmesh.auto import AutoModelForCausalLM as NeMoAutoModelForCausalLM
from expertmesh.parallel.setup import create_distributed_setup_from_config

__all__ = ["NeMoAutoModelForCausalLM", "create_distributed_setup_from_config"]
