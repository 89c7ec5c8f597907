"""The configuration: what is left out is filled in, what is misspelt is refused, and the model is the same after JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import AutoConfig

from test_cost import models
from twofold.errors import TwofoldError
from twofold.models import TwofoldConfig
from twofold.positions import LearnedPositions, NoPositions, RotaryPositions, SharedRotaryPositions
from twofold.presets import PRESETS
from twofold.spec import ModelSpec
from twofold.tie import Tie, TiePattern


def test_what_is_usual_is_filled_in_and_stored():
    config = TwofoldConfig(tie="(Q, K=V)", hidden_size=64, num_attention_heads=8)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (8, 8, 256)
    assert (config.vocab_size, config.causal, config.num_labels) == (256, True, 0)
    assert config.spec.positions == RotaryPositions()
    assert config.to_dict()["head_dim"] == 8
    assert TwofoldConfig(head_dim=7, positions=NoPositions(), num_key_value_heads=1).spec.head_dim == 7


def test_each_architecture_has_its_positions_and_inputs():
    images = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    image = TwofoldConfig(architecture="image_classification", **images).spec
    assert (image.positions, image.vocab_size, image.causal) == (LearnedPositions(length=17), 0, False)
    tokens = TwofoldConfig(architecture="token_classification", num_labels=3).spec
    assert (tokens.positions, tokens.vocab_size, tokens.num_labels, tokens.causal) == (NoPositions(), 256, 3, False)
    rows = TwofoldConfig(architecture="token_classification", num_labels=3, feature_size=5).spec
    assert (rows.vocab_size, rows.feature_size) == (0, 5)


def test_ties_and_windows_may_be_patterns_over_layers():
    config = TwofoldConfig(tie="3*(Q,K,V)|(Q,K=V)", window_tokens=(16, 0), num_hidden_layers=8)
    assert config.tie == "3*(Q, K, V) | (Q, K=V)"
    assert [str(config.spec.attention(layer).tie) for layer in (2, 3, 7)] == ["(Q, K, V)", "(Q, K=V)", "(Q, K=V)"]
    assert [config.spec.attention(layer).window_tokens for layer in (2, 3)] == [16, 0]
    assert TwofoldConfig(window_tokens=5).window_tokens == [5]


@pytest.mark.parametrize("tie", ["V = Q - K", Tie.parse("Q - K = V"), TiePattern.parse("V = Q-K")])
def test_a_tie_may_be_a_value(tie: Any):
    assert TwofoldConfig(tie=tie).tie == str(Tie.parse("V = Q - K"))


def test_positions_may_be_a_value():
    assert TwofoldConfig(positions=SharedRotaryPositions(dim=4)).positions == {
        "kind": "shared_rotary",
        "dim": 4,
        "theta": 10000.0,
        "key_dim": 0,
    }


@given(models())
@settings(max_examples=60)
def test_a_model_is_the_same_after_json(spec: ModelSpec):
    config = TwofoldConfig.from_spec(spec, eos_token_id=3)
    again = TwofoldConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    short = TwofoldConfig.from_dict(json.loads(config.to_json_string()))
    assert config.spec == again.spec == short.spec == spec
    assert again.eos_token_id == 3


def test_names_of_labels_are_kept(tmp_path: Path):
    config = TwofoldConfig(architecture="token_classification", id2label={0: "cat", 1: "dog", 2: "owl"})
    assert config.spec.num_labels == 3
    config.save_pretrained(tmp_path)
    assert TwofoldConfig.from_pretrained(tmp_path).id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_transformers_finds_it_by_its_folder(tmp_path: Path):
    TwofoldConfig.from_spec(PRESETS["tiny"]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TwofoldConfig
    assert config.spec == PRESETS["tiny"]
    assert AutoConfig.for_model("twofold", hidden_size=64).spec.head_dim == 16


def test_its_layers_have_a_kind_of_cache_of_their_own():
    assert TwofoldConfig(num_hidden_layers=3, window_tokens=5).layer_types == ["twofold_tied"] * 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hiden_size": 64}, "no field 'hiden_size': did you mean 'hidden_size'"),
        ({"num_attention_head": 4}, "did you mean 'num_attention_heads'"),
        ({"ties": "(Q, K=V)"}, "did you mean 'tie'"),
        ({"tie": "(Q, K"}, "bracket"),
        ({"tie": 3}, "tie is 3, but it must be a tie"),
        ({"tie": "(Q, K=V)", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"tie": "(Q, K, V) | (Q, K=V)", "num_hidden_layers": 3}, "2 layers, which does not divide the model's 3"),
        ({"tie": "(Q=K, V)", "num_key_value_heads": 2}, "as many KV heads"),
        ({"hidden_size": 65}, "hidden_size 65 does not split into 4 heads: say head_dim"),
        ({"hidden_size": "64"}, "hidden_size is '64', but it must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True, "head_dim": 8}, "hidden_size is True"),
        ({"num_key_value_heads": 3}, "3 KV heads do not divide 4 query heads"),
        ({"dropout": "0.1"}, "dropout is '0.1', but it must be a number"),
        ({"dropout": 1.0}, "dropout is 1.0, but it is a probability"),
        ({"gated_mlp": None}, "gated_mlp is None, but it must be true or false"),
        ({"causal": False}, "predicts the next token, so causal must be true"),
        ({"window_tokens": "5"}, "window_tokens is '5', but it must be a list of whole numbers"),
        ({"window_tokens": [5, 0, 1]}, "names 3 layers, which does not divide"),
        ({"window_tokens": [-5]}, "window_tokens is -5"),
        ({"positions": "rotary"}, "positions are 'rotary', but they must be a scheme"),
        ({"positions": {"kind": "spiral"}}, "'spiral' are not known"),
        ({"positions": {"kind": "rotary", "turns": 2}}, "do not fit"),
        ({"architecture": "bert"}, "architecture is 'bert', but it must be one of causal_lm"),
        ({"architecture": "image_classification"}, "image_size is 0"),
        ({"architecture": "image_classification", "image_size": 28, "patch_size": "7"}, "patch_size is '7'"),
        ({"architecture": "token_classification", "vocab_size": 5, "feature_size": 5}, "exactly one of vocab_size and"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_mistakes(fields: dict[str, Any], says: str):
    with pytest.raises(TwofoldError, match=says):
        TwofoldConfig(**fields)


def test_what_transformers_stores_beside_it_is_no_mistake(tmp_path: Path):
    config = TwofoldConfig(task_specific_params={"a": 1}, torchscript=False, problem_type=None)
    config.my_own = 3
    config.save_pretrained(tmp_path)
    assert TwofoldConfig.from_pretrained(tmp_path).my_own == 3
