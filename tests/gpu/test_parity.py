"""On the GPU, in bfloat16: expertmesh is as near to stock Transformers in float32 as stock in bfloat16 is."""

import pytest
import torch

from expertmesh.bench.parity import check_checkpoint
from expertmesh.bench.tiny import FAMILIES
from tests.models import saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_as_near_to_float32_as_stock(family):
    rows = list(check_checkpoint(saved(family), "cuda"))
    assert {"loss", "train logits", "eval logits", "gradients", "worst gradient"} <= {row.quantity for row in rows}
    assert not [row for row in rows if not row.ok]
