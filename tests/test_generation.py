"""``generate`` in all its ways gives what full recomputation gives, from a cache that holds what the tie needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from attention_strategies import POSITIONS
from model_strategies import GPT2, LLAMA, decoders, drawn_model, drawn_tokens, recompute_layers
from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.models import TwofoldForCausalLM
from twofold.models.causal_lm import CACHE_FIELD
from twofold.spec import ModelSpec

UNTIED = GPT2.with_changes(tie_word_embeddings=False)  # tied, it would say one token again and again
MODELS = {
    "gpt2": UNTIED,
    "llama": LLAMA,
    "stream": LLAMA.with_changes(positions=POSITIONS["stream"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"], num_key_value_heads=1, tie="(Q, K, V) | (Q, K=V)"),
    "bias": LLAMA.with_changes(positions=POSITIONS["bias"], num_attention_heads=2, tie="V = Q - K"),
    "windows": UNTIED.with_changes(tie="(Q=K=V)", window_tokens=(4, 0)),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(autouse=True)
def _warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers logs what it would warn of; what its assistants do against its own advice is not ours."""

    def refuse(message: str, *_: object, **__: object) -> None:
        if not message.startswith("Passing `generation_config` together"):
            raise AssertionError(message)

    for name in ("transformers.generation.utils", "transformers.utils.deprecation"):
        monkeypatch.setattr(logging.get_logger(name), "warning", refuse)


def generated(model: TwofoldForCausalLM, tokens: Tensor, count: int = 9, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"do_sample": False, "attention_mask": torch.ones_like(tokens), "max_new_tokens": count} | options
    return model.generate(tokens, **options)


@torch.no_grad()
def greedily(model: TwofoldForCausalLM, tokens: Tensor, count: int = 9) -> Tensor:
    """Token by token, everything computed again for each."""
    for _ in range(count):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_likeliest_token_each_time(name: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(3, 5)
    found = generated(model, tokens)
    assert torch.equal(found, greedily(model, tokens))
    assert len(set(found[:, 5:].flatten().tolist())) > 3


@given(decoders(), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=15)
def test_any_model_generates_what_it_would_recompute(spec: ModelSpec, prompt: int, seed: int):
    model, tokens = drawn_model(spec, seed), drawn_tokens(2, prompt, seed)
    assert torch.equal(generated(model, tokens, 5), greedily(model, tokens, 5))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "windows", "shared"])
def test_the_cache_changes_nothing(name: str, way: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(3, 5)
    with_cache = generated(model, tokens, **WAYS[way])
    assert torch.equal(with_cache, generated(model, tokens, use_cache=False, **WAYS[way]))
    assert with_cache.shape == (3 * WAYS[way].get("num_return_sequences", 1), 14)


# Every way to hold a cache, with options that make it exact: a quantized one whose tail is never full holds what was computed.
CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"q_group_size": 8}},
}


@pytest.mark.parametrize("held", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_however_the_cache_is_held(name: str, held: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(3, 7)
    assert torch.equal(generated(model, tokens, **CACHES[held]), greedily(model, tokens))
    mask = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
    padded = generated(model, tokens, attention_mask=mask, **CACHES[held])
    assert torch.equal(padded, generated(model, tokens, attention_mask=mask))
    chunked = generated(model, tokens, attention_mask=mask, prefill_chunk_size=3, **CACHES[held])
    assert torch.equal(padded, chunked)


@pytest.mark.parametrize("held", CACHES)
@pytest.mark.parametrize("way", ["beams", "several"])
def test_batches_change_in_every_cache(held: str, way: str):
    model, tokens = drawn_model(MODELS["windows"]), drawn_tokens(3, 5)
    assert torch.equal(generated(model, tokens, **WAYS[way], **CACHES[held]), generated(model, tokens, **WAYS[way]))


@pytest.mark.parametrize("name", ["llama", "windows", "stream", "shared", "gpt2"])
@torch.no_grad()
def test_few_bits_change_little(name: str):
    """Greedy texts of 8-bit caches are mostly those of whole ones, and logits of one long pass are near."""
    model, tokens = drawn_model(MODELS[name], std=0.2), drawn_tokens(2, 12)
    spec = MODELS[name]
    wanted = model(tokens, use_cache=False).logits[:, -1]
    errors = {}
    for bits in (8, 4):
        cache = TiedCache(spec, CacheSpec(bits=bits, group_size=8))
        model(tokens[:, :-1], cache=cache)
        found = model(tokens[:, -1:], cache=cache).logits[:, -1]
        errors[bits] = float((found - wanted).abs().max() / wanted.abs().max())
        assert cache.nbytes == cache_bytes(spec, 12, "fp64", batch=2, cache=CacheSpec(bits=bits, group_size=8))
    assert 0 < errors[8] < 0.01
    assert errors[8] < errors[4] < 0.15


@pytest.mark.parametrize("name", MODELS)
def test_texts_padded_on_the_left_are_continued_as_if_alone(name: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(3, 7)
    mask = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
    together = generated(model, tokens, attention_mask=mask)
    for row, start in enumerate([0, 2, 5]):
        alone = generated(model, tokens[row : row + 1, start:])
        assert torch.equal(together[row : row + 1, start:], alone)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_is_continued_from_its_cache(name: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(2, 5)
    first = generated(model, tokens, 4, return_dict_in_generate=True)
    cache = getattr(first, CACHE_FIELD)
    assert isinstance(cache, TiedCache)
    # The last token was drawn and not read yet.
    assert cache.nbytes == cache_bytes(MODELS[name], 8, "fp64", batch=2)
    kept = copy.deepcopy(cache)
    more = generated(model, first.sequences, 5, **{CACHE_FIELD: cache})
    assert torch.equal(more, greedily(model, tokens))
    again = generated(model, first.sequences, 5, **{CACHE_FIELD: kept})
    assert torch.equal(more, again)


@pytest.mark.parametrize("held", [CacheSpec(max_tokens=20), CacheSpec(bits=8, group_size=8, tail_tokens=20)])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_made_by_hand_is_filled_and_continued(name: str, held: CacheSpec):
    model, tokens, cache = drawn_model(MODELS[name]), drawn_tokens(2, 5), TiedCache(MODELS[name], held)
    first = generated(model, tokens, 4, **{CACHE_FIELD: cache})
    assert torch.equal(generated(model, first, 5, **{CACHE_FIELD: cache}), greedily(model, tokens))
    assert int(cache.get_seq_length()) == 13


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("assistant", ["lookup", "model"])
def test_candidates_are_kept_only_where_they_are_right(name: str, assistant: str):
    """Assisted decoding crops what was wrong, from windows too."""
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(1, 5).repeat(1, 3)
    helper = drawn_model(MODELS[name].with_changes(num_hidden_layers=2), seed=0, std=0.49)
    options = {"assistant_model": helper} if assistant == "model" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generated(model, tokens, **options), greedily(model, tokens))


def test_sentences_end():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 5)
    free = generated(model, tokens)
    end = int(free[0, 8])
    found = generated(model, tokens, eos_token_id=end, pad_token_id=0)
    length = 5 + free[0, 5:].tolist().index(end) + 1
    assert torch.equal(found[0, :length], free[0, :length])
    assert not found[0, length:].any()


def test_tokens_stream():
    class Streamer(BaseStreamer):
        seen: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    model, tokens = drawn_model(LLAMA), drawn_tokens(1, 5)
    found = generated(model, tokens, streamer=Streamer())
    assert Streamer.seen == [*found[0].tolist(), -1]


def test_a_prompt_may_be_embeddings():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 5)
    embedded = model.get_input_embeddings()(tokens).detach()
    found = model.generate(
        inputs_embeds=embedded, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens)
    )
    assert torch.equal(found, generated(model, tokens, 4)[:, 5:])


@torch.no_grad()
def test_both_names_of_the_cache_argument():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 6)
    wanted = model(tokens, use_cache=False).logits[:, 4:]
    for name in ("cache", "past_key_values"):
        cache = TiedCache(LLAMA)
        model(tokens[:, :4], **{name: cache})
        output = model(tokens[:, 4:], **{name: cache})
        torch.testing.assert_close(output.logits, wanted, rtol=1e-9, atol=1e-9)
        assert output[CACHE_FIELD] is cache
        assert cache.get_seq_length() == 6


def test_a_cache_is_made_where_it_is_of_use():
    """In evaluation, without labels and documents; or where it is asked for."""
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 6)

    def made(**options: Any) -> bool:
        return model(tokens, **options).get(CACHE_FIELD) is not None

    assert made()
    assert not made(use_cache=False)
    assert not made(labels=tokens)
    assert made(labels=tokens, use_cache=True)
    assert not made(document_ids=torch.zeros_like(tokens))
    model.train()
    assert not made()
    assert made(use_cache=True)
    recompute_layers(model)
    assert not made(use_cache=True)
    with torch.no_grad():
        assert made(use_cache=True)
    model.eval()
    model.config.use_cache = False
    assert not made()


def test_mistakes():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 6)
    for cache_config, told in (
        ({"backend": "hqq"}, "The quantizer 'hqq' holds keys and values apart"),
        ({"bits": 8}, "has no option 'bits': its options are backend, nbits"),
        ({"nbits": 3}, "A cache of 3 bits cannot be had: use 8 or 4"),
        ({"axis": "head", "residual_length": 9}, "keeps no tail as computed"),
        ({"q_group_size": 3}, "8 floats of a head do not split into groups of 3"),
    ):
        with pytest.raises(TwofoldError, match=told):
            generated(model, tokens, cache_implementation="quantized", cache_config=cache_config)
    cache = TiedCache(LLAMA)
    model(tokens, cache=cache)
    for options in ({"cache": cache}, {"cache": TiedCache(LLAMA)}, {"use_cache": True}):
        with pytest.raises(TwofoldError, match="Packed documents are read at once"):
            model(tokens, document_ids=torch.zeros_like(tokens), **options)
    with pytest.raises(TwofoldError, match=r"attention_mask has the shape \(2, 6\).*\(2, 12\)"):
        model(tokens, cache=cache, attention_mask=torch.ones_like(tokens))
    recompute_layers(model.train())
    with pytest.raises(TwofoldError, match="Gradient checkpointing cannot continue a cache"):
        model(tokens, cache=cache)
    limited = drawn_model(GPT2.with_changes(positions=type(GPT2.positions)(length=8)))
    with pytest.raises(TwofoldError, match="9 tokens is too long: this model has learned 8"):
        generated(limited, tokens)
