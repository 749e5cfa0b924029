"""What transformers' suite runs on: its ModelTesterMixin around stock classes and around ours.

`test_transformers_suite.py` runs this file with pytest in processes of its own, with `hf_tests` (see suite.py) on the
import path.
"""

import unittest

import torch
import transformers
from hf_tests.test_modeling_common import ModelTesterMixin, ids_tensor

from expertmesh.bench.tiny import tiny_config
from expertmesh.fuse import fused_class

FAMILIES = {
    "qwen3_moe": "Qwen3Moe",
    "gpt_oss": "GptOss",
    "deepseek_v3": "DeepseekV3",
    "nemotron_h": "NemotronH",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "glm4_moe": "Glm4Moe",
    "qwen3_next": "Qwen3Next",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "granitemoe": "GraniteMoe",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "phimoe": "Phimoe",
}


class Inputs:
    """The part of transformers' CausalLMModelTester that ModelTesterMixin uses; that file is not in the sdist."""

    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, num_attention_heads = 2, 12, 128, 32, 4

    def __init__(self, parent: "Common"):
        self.parent = parent
        self.num_hidden_layers = self.get_config().num_hidden_layers

    def get_config(self):
        return tiny_config(self.parent.family)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    family: str
    pipeline_model_mapping: dict = {}
    test_all_params_have_gradient = False  # an expert that no token chose has none

    def setUp(self):
        self.model_tester = Inputs(self)


for _family, _name in FAMILIES.items():
    _stock = getattr(transformers, f"{_name}ForCausalLM")
    for _side, _class in (("Stock", _stock), ("Ours", fused_class(_stock))):
        _attributes = {"family": _family, "all_model_classes": (_class,)}
        globals()[f"{_side}{_name}"] = type(f"{_side}{_name}", (Common, unittest.TestCase), _attributes)
