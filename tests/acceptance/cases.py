"""What transformers' suite runs on: its ModelTesterMixin around the stock Qwen3-MoE class and around ours.

`test_transformers_suite.py` runs this file with pytest in a process of its own, with `hf_tests` (see suite.py) on the
import path.
"""

import unittest

import torch
from hf_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers import Qwen3MoeForCausalLM

from expertmesh.bench.tiny import tiny_config
from expertmesh.fuse import fused_class


class Inputs:
    """The part of transformers' CausalLMModelTester that ModelTesterMixin uses; that file is not in the sdist."""

    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 2, 12, 128, 32, 2, 4

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        return tiny_config("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    pipeline_model_mapping: dict = {}
    test_all_params_have_gradient = False  # an expert that no token chose has none

    def setUp(self):
        self.model_tester = Inputs(self)


class StockTest(Common, unittest.TestCase):
    all_model_classes = (Qwen3MoeForCausalLM,)


class OursTest(Common, unittest.TestCase):
    all_model_classes = (fused_class(Qwen3MoeForCausalLM),)
