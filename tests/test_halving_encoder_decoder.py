"""Decoders that read an encoder too: one tensor for each of their two attentions, with and without biases of relative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halving_models import ENCODER_DECODER, cache_bytes, cache_of, going_on, randomized, source_of, tokens
from twofold.existing import halve, restore

T5_LIKE = ("t5", "mt5", "umt5", "longt5", "switch")
LENGTH = 23
"""More tokens than the encoder reads, and than plain products are used for."""


def answer(model: Any, source: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Tokens, the logits of each, and the cache."""
    made = model.generate(
        **source, max_new_tokens=7, min_new_tokens=7, return_dict_in_generate=True, output_logits=True, **options
    )
    return made.sequences, torch.stack(made.logits), cache_of(made)


@torch.no_grad()
def outcomes(model: Any, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model says in every way that its caches are filled and read."""
    text, mask = tokens(2, LENGTH, seed=4), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    encoded = model.get_encoder()(**source)
    given: dict[str, Any] = {"encoder_outputs": encoded}
    if "attention_mask" in source:
        given["attention_mask"] = source["attention_mask"]
    said = {"whole": model(**given, decoder_input_ids=text).logits}
    if "decoder_attention_mask" in model.forward.__code__.co_varnames:
        said["padded"] = model(**given, decoder_input_ids=text, decoder_attention_mask=mask).logits[mask.bool()]
    begun = model(**given, decoder_input_ids=text[:, :4], use_cache=True)
    for at, until in ((4, 9), (9, 10), (10, LENGTH)):
        going = model(**given, decoder_input_ids=text[:, at:until], use_cache=True, **going_on(model, cache_of(begun)))
        said[f"{at} to {until}"] = going.logits
    said["greedy"], said["greedy logits"], _ = answer(model, source, do_sample=False)
    said["beams"], said["beam logits"], _ = answer(model, source, do_sample=False, num_beams=3)
    torch.manual_seed(0)
    said["sampled"], said["sampled logits"], _ = answer(model, source, do_sample=True, top_k=0)
    static = {"cache_implementation": "static", "disable_compile": True}
    said["static"], said["static logits"], _ = answer(model, source, do_sample=False, **static)
    said["without"], said["logits without"], _ = answer(model, source, do_sample=False, use_cache=False)
    return said


@pytest.mark.parametrize("keep", ["keys", "values"])
@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_both_attentions_keep_one_tensor_and_say_the_same(name: str, keep: Any):
    model = randomized(ENCODER_DECODER[name]())
    source = source_of(name)
    before, whole = outcomes(model, source), answer(model, source, do_sample=False)[2]
    report = halve(model, keep=keep)
    after, half = outcomes(model, source), answer(model, source, do_sample=False)[2]
    assert report.num_halved == len(report.layers) == 4
    for what, expected in before.items():
        if expected.is_floating_point():
            torch.testing.assert_close(after[what], expected, rtol=1e-8, atol=1e-8, msg=f"{what} differs")
        else:
            assert torch.equal(after[what], expected), what
    for kind in ("self_attention_cache", "cross_attention_cache"):
        counts, halves = (cache_bytes(getattr(held, kind)) for held in (whole, half))
        assert len(counts) == 2
        assert [2 * part for part in halves] == counts
    restore(model)
    again = outcomes(model, source)
    assert all(torch.equal(before[what], again[what]) for what in before)


@pytest.mark.parametrize("name", T5_LIKE)
def test_eager_attention_gives_its_weights_and_its_bias(name: str):
    model = randomized(ENCODER_DECODER[name]())
    model.set_attn_implementation("eager")
    source = source_of(name)
    asked = {"decoder_input_ids": tokens(2, 6), "output_attentions": True}
    before = model(**source, **asked)
    halve(model)
    after = model(**source, **asked)
    for kind in ("decoder_attentions", "cross_attentions"):
        for expected, found in zip(getattr(before, kind), getattr(after, kind), strict=True):
            torch.testing.assert_close(found, expected)
