"""Names that NeMo AutoModel scripts import, so that such a script only has to change its import lines."""

from expertmesh.auto import AutoModelForCausalLM as NeMoAutoModelForCausalLM
from expertmesh.parallel.setup import create_distributed_setup_from_config

__all__ = ["NeMoAutoModelForCausalLM", "create_distributed_setup_from_config"]
