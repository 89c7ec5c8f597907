"""Estimates are held against reality: real caches of many families, real parameters, real files; what is not known is refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine_models import FAMILIES, LLAMA, STATES, config_of, folder_of, measured_bytes, random_model
from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.cost import DTYPE_BYTES, cache_bytes, parameters
from twofold.errors import TwofoldError
from twofold.estimate import MOST, Holding, Question, cache_of, engine, estimate_layers, estimate_spec
from twofold.estimate.engine import inspect
from twofold.estimate.fields import expanded, read_layers
from twofold.estimate.layers import CachedTensor, LayerCache, group_size, pair, prompt_bytes
from twofold.estimate.layers import cache_bytes as layers_bytes
from twofold.estimate.memory import UNITS, read_memory
from twofold.estimate.ways import EXACT, EXPANDED, LATENT, STORED, TIED, ways_of
from twofold.estimate.weights import stored_weights
from twofold.models import TwofoldConfig, build_model
from twofold.presets import PRESETS
from twofold.spec import ModelSpec

FP32 = {"width": 4, "batch": 2}
TINY = PRESETS["tiny"].with_changes(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=10, intermediate_size=20
)


def counted(layers: tuple[LayerCache, ...], tokens: int) -> int:
    return layers_bytes(layers, tokens, cache=CacheSpec(), **FP32)


# Amounts of memory


@given(st.fractions(min_value=1, max_value=5000), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_an_amount_is_a_number_times_its_unit(number: Fraction, unit: str, space: str):
    decimal = f"{float(number):.3f}"
    for spelling in (unit, unit.lower(), unit.upper()):
        assert read_memory(f"{decimal}{space}{spelling}") == int(Fraction(decimal) * UNITS[unit])


def test_binary_and_decimal_units_differ():
    assert read_memory("24GiB") == 24 * 2**30
    assert read_memory("24GB") == read_memory("24000MB") == 24 * 10**9


@pytest.mark.parametrize("text", ["", "24", "24G", "much", "-1GiB", "1e3GB", "24 XB", "0GiB", "0.2B", "1.2.3GB"])
def test_what_is_no_amount_is_refused(text: str):
    with pytest.raises(TwofoldError, match="GiB"):
        read_memory(text)


# Models of others: the counts are what real caches hold


@pytest.mark.parametrize("family", [*FAMILIES.values(), *STATES.values()], ids=[*FAMILIES, *STATES])
def test_a_count_is_what_the_running_cache_holds(family: tuple[str, dict[str, Any]], tmp_path: Path):
    folder = folder_of(family, tmp_path)
    found = inspect(folder, "fp32")
    model = random_model(family)
    if family not in STATES.values():  # the configuration alone says the same
        assert found.read == read_layers(json.loads((folder / "config.json").read_text())) == found.layers
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.name == type(model).__name__
    for prompt, further in ((0, 4), (9, 2)):  # windows are of 5 tokens, blocks of 3 and 5
        measured = measured_bytes(model, batch=2, prompt=prompt, further=further)
        assert counted(found.layers, prompt + further) == measured
    assert prompt_bytes(found.layers, 9, **FP32) == measured_bytes(model, batch=2, prompt=9, further=0)


def test_a_v4_cache_is_counted_over_whole_blocks(tmp_path: Path):
    family = FAMILIES["deepseek v4"]
    layers, model = inspect(folder_of(family, tmp_path), "bf16").layers, random_model(family, torch.bfloat16)
    for tokens in (1, 2, 3, 14, 15, 16):
        measured = measured_bytes(model, batch=2, prompt=0, further=tokens)
        assert layers_bytes(layers, tokens, width=2, batch=2, cache=CacheSpec()) == measured
    assert not [layer for layer in layers[:2] if layer.key_and_value]
    assert layers[2].key_and_value  # its plain window keeps one tensor twice
    assert [layer.is_one for layer in layers] == [True] * 3


def test_the_running_cache_is_right_where_the_reading_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(FAMILIES["llama GQA"], tmp_path)
    layers = inspect(folder).layers
    monkeypatch.setattr(engine, "read_layers", lambda fields: (LayerCache(tensors=pair(6, 4)),) * 3)
    found = inspect(folder)
    assert found.layers == layers
    assert found.read != layers


def test_a_mixture_of_experts_that_cannot_be_asked_is_read_and_says_so(tmp_path: Path):
    fields = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 6,
              "intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2}  # fmt: skip
    family = ("jetmoe", fields)
    found = inspect(folder_of(family, tmp_path), "fp32")
    assert counted(found.layers, 7) == measured_bytes(random_model(family), batch=2, prompt=3, further=4)
    (note,) = found.notes
    assert "could not be asked" in note


def test_what_a_state_takes_is_told(tmp_path: Path):
    found = inspect(folder_of(STATES["qwen 3 next"], tmp_path), "fp32")
    (note,) = found.notes
    assert note.startswith("2 of 3 layers keep a state of fixed size")
    assert counted(found.layers, 8) - counted(found.layers, 7) == 2 * 2 * 2 * 8 * 4  # one layer of K and V grows


def test_heads_that_are_stored_several_times_are_told(tmp_path: Path):
    (note,) = inspect(folder_of(FAMILIES["falcon GQA, stored whole"], tmp_path)).notes
    assert "2 KV heads 3 times" in note


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        (("bart", {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 67}), "encoder and a decoder"),
        (("bert", {**LLAMA, "num_hidden_layers": 1}), "gives no cache back"),
        (("minimax", {**LLAMA, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}), "a cache of its own"),
        (("cpmant", {"vocab_size": 67, "hidden_size": 24, "num_attention_heads": 2, "dim_head": 12, "dim_ff": 8, "num_hidden_layers": 1}), "one for each token"),
        (("xlnet", {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8, "vocab_size": 67}), "might mislead"),
        (("vit", {"hidden_size": 8, "num_hidden_layers": 1}), "cannot build a vit language model"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_not_known_is_said(family: tuple[str, dict[str, Any]], sentence: str, tmp_path: Path):
    with pytest.raises(TwofoldError, match=sentence):
        inspect(folder_of(family, tmp_path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"layer_types": ["full_attention", "holographic_attention", "full_attention"]},
            "Layer 1 is of the kind 'holographic_attention'",
        ),
        (
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "Layer 1 is a linear_attention layer",
        ),
        ({"layer_types": ["full_attention"]}, "kinds of 1 layers, but has 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "does not say sliding_window"),
        ({"attn_layer_period": 2}, "attn_layer_period"),
        ({"num_hidden_layers": None}, "does not say num_hidden_layers"),
        ({"num_attention_heads": "many"}, "has 'many' for num_attention_heads"),
        ({"layer_types": ["compressed_sparse_attention"] * 3}, "compress_rates"),
    ],
)
def test_a_configuration_that_does_not_settle_it_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(TwofoldError, match=sentence):
        read_layers({**LLAMA, **changes})


def test_rules_for_configurations_that_name_no_kinds():
    windows = [
        layer.tensors[0].size for layer in read_layers({**LLAMA, "sliding_window": 5, "sliding_window_pattern": 2})
    ]
    assert windows == [5, 0, 5]
    assert [
        layer.tensors[0].size for layer in read_layers({**LLAMA, "sliding_window": 5, "use_sliding_window": False})
    ] == [0] * 3
    assert [layer.tensors[0].size for layer in read_layers({**LLAMA, "attention_chunk_size": 7})] == [7] * 3
    before = {
        **LLAMA,
        "layer_types": ["full_attention"] * 3,
        "attention_k_eq_v": True,
        "global_head_dim": 9,
        "num_global_key_value_heads": 1,
    }
    assert {(t.heads, t.dim) for layer in read_layers(before) for t in layer.tensors} == {(1, 9)}
    assert read_layers({"text_config": LLAMA, "model_type": "any"}) == read_layers(LLAMA)


# What a tie would keep


def test_a_tie_keeps_one_of_two_equal_tensors():
    layers = read_layers({**LLAMA, "num_key_value_heads": 2})
    ways = dict(ways_of(layers, layers, {}))
    assert list(ways) == [STORED, TIED]
    assert 2 * counted(ways[TIED], 7) == counted(ways[STORED], 7)


def test_gemma_4_keeps_one_tensor_exactly_in_the_layers_of_one_projection(tmp_path: Path):
    found = inspect(folder_of(FAMILIES["gemma 4 K=V"], tmp_path))
    ways = dict(ways_of(found.layers, found.read, found.fields))
    assert list(ways) == [STORED, EXACT, TIED]
    tensors = [[len(layer.tensors) for layer in way] for way in ways.values()]
    assert tensors == [[2, 2, 2, 2], [2, 1, 2, 1], [1, 1, 1, 1]]
    plain = inspect(folder_of(FAMILIES["gemma 4"], tmp_path))
    assert [name for name, _ in ways_of(plain.layers, plain.read, plain.fields)] == [STORED, TIED]


def test_a_latent_stands_beside_the_heads_that_it_is_for(tmp_path: Path):
    found = inspect(folder_of(FAMILIES["deepseek v3"], tmp_path))
    ways = dict(ways_of(found.layers, found.read, found.fields))
    assert list(ways) == [STORED, EXPANDED]
    assert counted(ways[STORED], 1) == 2 * 4 * 3 * (10 + 4)
    assert counted(ways[EXPANDED], 1) == 2 * 4 * 3 * 4 * (8 + 4 + 6)
    # An engine that stores the heads is shown the latent.
    assert [name for name, _ in ways_of(ways[EXPANDED], found.read, found.fields)] == [STORED, LATENT]
    assert expanded(LLAMA, read_layers(LLAMA)) == ()


def test_nothing_to_tie_is_nothing_more_to_show():
    layers = read_layers({**LLAMA, "v_head_dim": 3})
    assert ways_of(layers, layers, {}) == [(STORED, layers)]


# Tables


def held_as(row: Holding) -> CacheSpec:
    """The cache that a row counts."""
    if row.bits and not row.group_size:
        return CacheSpec(bits=row.bits, axis="head")
    return CacheSpec(bits=row.bits, group_size=row.group_size or 32)


@pytest.mark.parametrize("name", PRESETS)
def test_a_table_of_ours_is_made_of_the_costs(name: str):
    question = Question(tokens=640, batch=3, dtype="fp16")
    estimate = estimate_spec(PRESETS[name], name, question)
    assert estimate.parameters == parameters(PRESETS[name])
    assert [(row.name, row.bits, row.group_size) for row in estimate.holdings] == [
        (tie, *bits) for tie in ("(Q, K, V)", "(Q, K=V)") for bits in ((0, 0), (8, 0), (8, 32), (4, 32))
    ]
    for row in estimate.holdings:
        tied = PRESETS[name].with_changes(tie=row.name)
        assert row.weight_bytes == 2 * parameters(tied)
        assert row.cache_bytes == cache_bytes(tied, 640, "fp16", 3, held_as(row))
        assert row.total_bytes == row.weight_bytes + row.cache_bytes
        assert row.bytes_per_token * 3 * 640 == row.cache_bytes
        assert row.longest_context is row.largest_batch is None


def test_a_table_of_ours_is_what_a_running_cache_holds():
    """head_dim 10 does not split into groups of 32 floats: groups that fit are chosen."""
    question = Question(tokens=7, batch=2, dtype="fp32")
    for row in estimate_spec(TINY, "tiny", question).holdings:
        model = build_model(TINY.with_changes(tie=row.name), seed=0).eval()
        cache = TiedCache(model.config.spec, held_as(row))
        with torch.no_grad():
            model(torch.zeros(2, 6, dtype=torch.long), cache=cache)
            model(torch.zeros(2, 1, dtype=torch.long), cache=cache)
        assert cache.nbytes == row.cache_bytes


def test_the_models_own_tie_comes_first_and_impossible_ones_are_told():
    spec = TINY.with_changes(tie="(Q, K=V)", positions={"kind": "rotary", "rotate": "stream"})
    estimate = estimate_spec(spec, "mine", Question())
    assert {row.name for row in estimate.holdings} == {"(Q, K=V)"}
    (note,) = estimate.notes
    assert note.startswith("(Q, K, V): rotate='stream'")
    assert estimate_spec(TINY.with_changes(tie="V = Q - K"), "mine", Question()).holdings[0].name == "V = Q - K"
    with pytest.raises(TwofoldError, match="rotate='stream'"):
        estimate_spec(spec, "mine", Question(), ["(Q, K, V)"])


def test_only_a_language_model_keeps_a_cache():
    classifier = {**TINY.to_dict(), "architecture": "token_classification", "num_labels": 2, "causal": False}
    with pytest.raises(TwofoldError, match="only a causal_lm"):
        estimate_spec(ModelSpec.from_dict(classifier), "mine", Question())


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"batch": 0}, {"dtype": "bf17"}])
def test_an_impossible_question_is_refused(wrong: dict[str, Any]):
    with pytest.raises(TwofoldError):
        Question(**wrong)


# What fits


layers_strategy = st.lists(
    st.builds(
        lambda heads, dim, window, state: LayerCache(tensors=pair(heads, dim, window_tokens=window), state_bytes=state),
        st.integers(1, 5), st.sampled_from([4, 8, 10, 32, 96]), st.sampled_from([0, 0, 5, 60]), st.sampled_from([0, 77]),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@given(
    layers_strategy, st.integers(1, 10**6), st.integers(1, 40), st.integers(1, 9), st.sampled_from(sorted(DTYPE_BYTES))
)
def test_the_longest_text_and_the_largest_batch_fit_and_one_more_does_not(
    layers: list[LayerCache], memory: int, tokens: int, batch: int, dtype: str
):
    question, weights = Question(tokens=tokens, batch=batch, dtype=dtype, memory=memory), 1234
    estimate = estimate_layers([("any", layers)], "any", question, parameters=1, weight_bytes=weights)
    for row in estimate.holdings:
        cache = held_as(row)

        def total(length: int, sequences: int, cache: CacheSpec = cache) -> int:
            return weights + layers_bytes(layers, length, width=DTYPE_BYTES[dtype], batch=sequences, cache=cache)

        assert row.total_bytes == total(tokens, batch)
        assert row.longest_context is not None
        assert row.largest_batch is not None
        if row.longest_context:
            assert total(row.longest_context, batch) <= memory
        if row.longest_context < MOST:
            assert total(row.longest_context + 1, batch) > memory
            assert row.context_ends == "memory"
        else:
            assert row.context_ends == "nothing"
        if row.largest_batch:
            assert total(tokens, row.largest_batch) <= memory
        assert total(tokens, row.largest_batch + 1) > memory


def test_positions_end_a_text_before_memory_does():
    question = Question(tokens=4096, memory=read_memory("24GiB"))
    estimate = estimate_spec(PRESETS["paper-300m"], "paper-300m", question)
    assert {(row.longest_context, row.context_ends) for row in estimate.holdings} == {(2048, "positions")}
    assert estimate.notes == ("4,096 tokens are more than the 2,048 positions that the model has.",)


@given(st.sets(st.integers(1, 200), min_size=1, max_size=4), st.sampled_from([4, 8]))
def test_groups_fit_every_tensor_or_there_are_none(dims: set[int], bits: int):
    cache = cache_of(dims, bits)
    if cache is None:
        assert any(dim * bits % 8 for dim in dims)
        return
    for dim in dims:
        assert dim % cache.group(dim) == 0
    larger = [size for size in range(cache.group_size + 1, 33) if all(dim % min(size, dim) == 0 for dim in dims)]
    assert not larger
    assert group_size({64, 128}, bits) == 32


def test_tensors_are_kept_as_they_say():
    tensor = CachedTensor(name="any", heads=1, dim=1)
    kept = {"all": [0, 1, 2, 3, 4, 7], "window": [0, 1, 2, 3, 3, 3], "compressed": [0, 0, 0, 1, 1, 2],
            "unfinished": [0, 1, 2, 3, 1, 1], "last block": [0, 0, 0, 3, 3, 3]}  # fmt: skip
    for kind, tokens in kept.items():
        assert [replace(tensor, kept=kind, size=3).tokens(n) for n in (0, 1, 2, 3, 4, 7)] == tokens


# Weights in files


def test_weights_are_counted_from_their_headers(tmp_path: Path):
    model = random_model(FAMILIES["llama"], torch.bfloat16)
    for folder, limit in ((tmp_path / "whole", "5GB"), (tmp_path / "parts", "5KB")):
        model.save_pretrained(folder, max_shard_size=limit)
        stored = stored_weights(folder)
        assert stored
        floats = sum(parameter.numel() for parameter in model.parameters())
        assert (stored.floats, stored.other_bytes, stored.file_bytes) == (floats, 0, 2 * floats)
        assert stored.nbytes(4) == 4 * floats
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert stored_weights(tmp_path) is None


def test_quantized_weights_stay_as_they_are_stored(tmp_path: Path):
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(7, dtype=torch.uint8),
        "c": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_weights(tmp_path)
    assert stored
    assert (stored.floats, stored.other_bytes, stored.nbytes(4)) == (15, 9, 69)


def test_damaged_weights_are_told(tmp_path: Path):
    save_file({"a": torch.zeros(30)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content, sentence in (
        (whole[:-1], "cut off"),
        (whole[:20], "damaged"),
        (b"no", "damaged"),
        (b"", "does not begin"),
        (b"\xff" * 99, "does not begin"),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(TwofoldError, match=sentence):
            stored_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(TwofoldError, match="not whole"):
        stored_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(TwofoldError, match="names no files"):
        stored_weights(tmp_path)


# Every language model that Transformers has


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_language_model_of_transformers_is_counted_or_refused_in_a_sentence(tmp_path: Path):
    """With the sizes of its default configuration, up to a trillion parameters, none of which is allocated."""
    agreed, counted_types, refusals = [], [], dict[str, str]()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            CONFIG_MAPPING[kind]().save_pretrained(tmp_path / kind)
        except Exception:  # noqa: BLE001 (a configuration without usable defaults)
            continue
        try:
            found = inspect(tmp_path / kind)
        except TwofoldError as error:
            refusals[kind] = str(error)
            continue
        assert found.layers, kind
        counted_types.append(kind)
        if found.read == found.layers:
            agreed.append(kind)
    assert not [kind for kind, sentence in refusals.items() if not sentence.endswith((".", "?"))]
    assert len(counted_types) >= 100
    assert len(agreed) >= 0.8 * len(counted_types)


def test_counting_loads_no_torch():
    script = (
        "import sys, json; from twofold.estimate.fields import read_layers; from twofold.estimate import *; from twofold.estimate.ways import *;"
        f"read_layers({LLAMA!r}); from twofold.estimate.weights import stored_weights; import twofold.cli.estimate;"
        "sys.exit(','.join({'torch', 'transformers', 'numpy'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_ours_is_read_from_the_configuration_that_is_saved(tmp_path: Path):
    TwofoldConfig.from_spec(TINY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert set(TINY.to_dict()) - {"num_labels"} <= set(values)
    assert config_of(FAMILIES["gpt2"]).model_type == "gpt2"
