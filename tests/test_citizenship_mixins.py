"""Transformers' own tests of models, run on ours, wherever a checkout of Transformers is given: ``TWOFOLD_TRANSFORMERS_CHECKOUT=/its/folder``.

The tests are not in Transformers' wheel. The checkout should be of the release that is installed, and needs ``pip install parameterized httpx``; only its
``tests`` are read. What is skipped here is named below with its reason; what Transformers' tests skip by themselves, they say (``pytest -rs``).
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.models import (
    TwofoldConfig,
    TwofoldForCausalLM,
    TwofoldForImageClassification,
    TwofoldForTokenClassification,
)

CHECKOUT = os.environ.get("TWOFOLD_TRANSFORMERS_CHECKOUT", "")
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.filterwarnings("default")]

if not CHECKOUT:
    pytest.skip("TWOFOLD_TRANSFORMERS_CHECKOUT names no checkout of Transformers.", allow_module_level=True)
if not (Path(CHECKOUT) / "tests" / "test_modeling_common.py").exists():
    pytest.fail(f"TWOFOLD_TRANSFORMERS_CHECKOUT is {CHECKOUT}, but holds no tests/test_modeling_common.py.")
sys.path.insert(0, CHECKOUT)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    common = importlib.import_module("tests.test_modeling_common")
    generation = importlib.import_module("tests.generation.test_utils")
    configuration = importlib.import_module("tests.test_configuration_common")


def skipping(reasons: Mapping[str, str]) -> Any:
    """Skip the tests that are named, and refuse a name that is none."""

    def change(cls: type) -> type:
        tests = [name for name in dir(cls) if name.startswith("test_")]
        for name, reason in reasons.items():
            assert name in tests, f"{cls.__name__} has no {name} to be skipped."
            setattr(cls, name, unittest.skip(reason)(getattr(cls, name)))
        return cls

    return change


class Inputs:
    """What the mixins ask for: small configurations and inputs."""

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 3
    image_size = 20
    patch_size = 5

    def __init__(self, parent: object, **fields: Any) -> None:
        self.parent, self.fields = parent, fields
        if fields.get("architecture") == "image_classification":
            self.seq_length = (self.image_size // self.patch_size) ** 2 + 1

    def get_config(self) -> TwofoldConfig:
        return TwofoldConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            **self.fields,
        )

    def tokens(self) -> Tensor:
        return torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))

    def prepare_config_and_inputs_for_common(self) -> tuple[TwofoldConfig, dict[str, Tensor]]:
        config = self.get_config()
        if config.architecture == "image_classification":
            return config, {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}
        tokens = self.tokens()
        return config, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


CAUSAL_LM: Mapping[str, Any] = {
    "tie": "(Q, K=V)", "vocab_size": 99, "num_key_value_heads": 2, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0,
    "positions": {"kind": "rotary", "theta": 10000.0, "fraction": 1.0, "proportional": False, "rotate": "read"},
}  # fmt: skip
TOKENS: Mapping[str, Any] = {
    "architecture": "token_classification",
    "tie": "(Q=K, V)",
    "vocab_size": 99,
    "num_labels": 3,
}
IMAGES: Mapping[str, Any] = {
    "architecture": "image_classification", "tie": "(Q, K=V)", "image_size": 20, "patch_size": 5, "num_channels": 3, "num_labels": 3,
}  # fmt: skip

SKIPPED: Mapping[str, str] = {
    "test_correct_missing_keys": "There is no model without a head: what base_model names is a module and saves nothing.",
    "test_sdpa_can_dispatch_non_composite_models": "Where nothing is said a Twofold model attends by 'twofold' and not by 'sdpa'.",
}
STATIC = "Asks for the class StaticCache: a tied cache is a TiedCache whether it grows or has its room pre-allocated; see tests/test_cache_kinds.py."
SKIPPED_OF_CAUSAL_LM = SKIPPED | {
    "test_generate_with_static_cache": STATIC,
    "test_generate_from_inputs_embeds_with_static_cache": STATIC,
    "test_generate_compilation_all_outputs": STATIC,
    "test_generate_compile_model_forward_fullgraph": STATIC,
}
SKIPPED_OF_IMAGES = SKIPPED | {
    "test_model_get_set_embeddings": "An image's input embedding is a convolution, as in Transformers' own vision models, which skip this test too.",
    "test_problem_types": "It gives each image one label: several labels and regression are refused in a sentence.",
}


class ModelTests:
    """What the three architectures share."""

    fields: Mapping[str, Any] = {}

    def setUp(self) -> None:
        self.model_tester = Inputs(self, **self.fields)
        stored = {name: value for name, value in self.fields.items() if name != "num_labels"}  # stored as id2label
        self.config_tester = configuration.ConfigTester(self, config_class=TwofoldConfig, **stored)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


@skipping(SKIPPED_OF_CAUSAL_LM)
class TestCausalLM(generation.GenerationTesterMixin, common.ModelTesterMixin, ModelTests, unittest.TestCase):
    all_model_classes = (TwofoldForCausalLM,)
    fields = CAUSAL_LM


@skipping(SKIPPED)
class TestTokenClassification(common.ModelTesterMixin, ModelTests, unittest.TestCase):
    all_model_classes = (TwofoldForTokenClassification,)
    fields = TOKENS


@skipping(SKIPPED_OF_IMAGES)
class TestImageClassification(common.ModelTesterMixin, ModelTests, unittest.TestCase):
    all_model_classes = (TwofoldForImageClassification,)
    fields = IMAGES
    test_resize_embeddings = False
