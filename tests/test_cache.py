"""The tied cache: its bytes are those that the cost floor counts, and whatever is done to it, the next logits are those of full recomputation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from attention_strategies import POSITIONS
from model_strategies import GPT2, LLAMA, decoders, drawn_model, drawn_tokens
from twofold.cache import LayerView, TiedCache, TiedLayer, storage_bytes
from twofold.cost import cache_bytes, cached_bytes_per_token, cached_streams
from twofold.errors import TwofoldError
from twofold.models import TwofoldPreTrainedModel
from twofold.spec import ModelSpec

TOLERANCE = 1e-9


@torch.no_grad()
def whole(model: TwofoldPreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits without a cache."""
    return model(tokens, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def step(model: TwofoldPreTrainedModel, cache: TiedCache, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the tokens that follow those in the cache."""
    return model(tokens, attention_mask=mask, cache=cache).logits


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


# Cached decoding is full recomputation


def decode(spec: ModelSpec, chunks: list[int], pads: int, seed: int) -> tuple[Tensor, Tensor, TiedCache]:
    """Logits in chunks and at once, of the second of two rows and of what is text in the first."""
    model, tokens = drawn_model(spec, seed), drawn_tokens(2, sum(chunks), seed)
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    cache, parts, end = TiedCache(spec), [], 0
    for part in tokens.split(chunks, dim=1):
        end += part.shape[1]
        parts.append(step(model, cache, part, mask[:, :end] if pads else None))
        assert cache.nbytes == cache_bytes(spec, end, "fp64", batch=2)
    text = mask.bool()
    return torch.cat(parts, dim=1)[text], whole(model, tokens, mask)[text], cache


@given(decoders(), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=120)
def test_chunks_of_any_size_decode_what_is_computed_at_once(spec: ModelSpec, chunks: list[int], pads: int, seed: int):
    found, wanted, cache = decode(spec, chunks, min(pads, sum(chunks) - 1), seed)
    assert_near(found, wanted)
    for index, layer in enumerate(cache.layers):
        attention = spec.attention(index)
        assert len(layer.streams) == len(cached_streams(attention))


@pytest.mark.parametrize("positions", sorted(POSITIONS))
@given(data=st.data())
@settings(max_examples=5)
def test_every_position_scheme_decodes_token_by_token(positions: str, data: st.DataObject):
    found, wanted, _ = decode(data.draw(decoders(positions=positions)), [1] * 9, data.draw(st.sampled_from([0, 2])), 3)
    assert_near(found, wanted)


@pytest.mark.long
@given(decoders(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=1500)
def test_chunks_at_length(spec: ModelSpec, chunks: list[int], pads: int, seed: int):
    found, wanted, _ = decode(spec, chunks, min(pads, sum(chunks) - 1), seed)
    assert_near(found, wanted)


def test_the_comparison_can_fail():
    """A liar: a cache that has lost its first token gives other logits."""
    model, tokens, cache = drawn_model(LLAMA), drawn_tokens(2, 6), TiedCache(LLAMA)
    step(model, cache, tokens[:, :5])
    for layer in cache.layers:
        layer.streams = tuple(stream.clone().index_fill_(2, torch.tensor([0]), 0.0) for stream in layer.streams)
    with pytest.raises(AssertionError):
        assert_near(step(model, cache, tokens[:, 5:]), whole(model, tokens)[:, 5:])


# Bytes


def test_one_tensor_where_two_would_be():
    """Measured, not calculated: the storages of a (Q, K=V) cache are half of those of (Q, K, V)."""
    tokens, measured = drawn_tokens(3, 11), {}
    for tie in ("(Q, K, V)", "(Q=K, V)", "(Q, K=V)", "(Q=K=V)", "3V = -2K"):
        spec = GPT2.with_changes(tie=tie)
        cache = TiedCache(spec)
        step(drawn_model(spec), cache, tokens)
        measured[tie] = cache.nbytes
        assert [len(streams) for streams in cache] == [spec.attention(0).tie.cached_tensors] * 2
    assert set(measured.values()) == {measured["(Q, K, V)"], measured["(Q, K, V)"] // 2}
    assert measured["(Q, K=V)"] * 2 == measured["(Q=K, V)"]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_bytes_follow_the_dtype(dtype: torch.dtype, name: str):
    model, cache = drawn_model(LLAMA).to(dtype), TiedCache(LLAMA)
    for part in drawn_tokens(2, 7).split([4, 1, 2], dim=1):
        step(model, cache, part)
    assert cache.nbytes == 2 * 7 * cached_bytes_per_token(LLAMA, name)


def test_bytes_count_storages():
    """A view costs nothing twice, and a slice costs all that it keeps alive."""
    tensor = torch.zeros(10, 4)
    assert storage_bytes([tensor, tensor[2:], tensor.T]) == 160
    assert storage_bytes([tensor[:1]]) == 160
    assert storage_bytes([tensor, torch.zeros(1)]) == 164


def test_a_trimmed_window_keeps_nothing_else_alive():
    layer = TiedLayer(window_tokens=3)
    layer.append([torch.zeros(2, 1, 50, 8)])
    assert layer.nbytes == 2 * 3 * 8 * 4
    layer.crop(-1)
    assert layer.nbytes == 2 * 2 * 8 * 4


# Transformers' side, and mistakes


def test_a_layer_answers_what_transformers_asks():
    cache = TiedCache(LLAMA.with_changes(window_tokens=(3, 0)))
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.nbytes) == (2, -1, 0, 0)
    assert (cache.is_sliding, cache.is_compileable, cache.get_max_length()) == ([True, False], False, -1)
    assert cache.layers[0].keys is None
    assert cache.layers[0].values is None
    for layer in cache.layers:
        layer.append([torch.zeros(2, 3, 5, 8), torch.ones(2, 3, 5, 8)])
    assert cache.get_mask_sizes(2, 0) == (2 + 2, 3)
    assert cache.get_mask_sizes(2, 1) == (7, 0)
    assert cache.batch_size == 2
    first = cache.layers[0]
    assert first.keys is first.streams[0]
    assert first.values is first.streams[1]
    first.reset()
    assert (first.get_seq_length(), first.nbytes, first.keys) == (0, 0, None)


def test_mistakes():
    cache = TiedCache(LLAMA)
    cache.layers[0].append([torch.zeros(2, 3, 5, 8)])
    with pytest.raises(TwofoldError, match=r"\(2, 3, 8\).*was given.*\(1, 3, 8\)"):
        cache.layers[0].append([torch.zeros(1, 3, 1, 8)])
    with pytest.raises(TwofoldError, match="one cache for one batch"):
        cache.layers[0].append([torch.zeros(2, 3, 1, 8)] * 2)
    with pytest.raises(TwofoldError, match="streams, not keys and values"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(TwofoldError, match="streams, not keys and values"):
        cache.layers[0].values = torch.zeros(1)
    for impossible in (1, -6):
        with pytest.raises(TwofoldError, match=f"5 tokens cannot be cropped by {impossible}"):
            cache.layers[0].crop(impossible)
    with pytest.raises(TwofoldError, match=r"DynamicCache keeps keys and values apart.*TiedCache"):
        LayerView(DynamicCache(), 0)
    with pytest.raises(TwofoldError, match="TiedCache"):
        LayerView(cache, 2)


def test_a_model_refuses_a_cache_that_is_not_its_own():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 3)
    with pytest.raises(TwofoldError, match="keeps keys and values apart"):
        step(model, DynamicCache(), tokens)
    other = TiedCache(LLAMA.with_changes(head_dim=16))
    step(drawn_model(LLAMA.with_changes(head_dim=16)), other, tokens)
    with pytest.raises(TwofoldError, match="in layer 0 its head_dim is 16, and this model's is 8"):
        step(model, other, tokens)
