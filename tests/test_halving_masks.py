"""Masks that a user makes: added to the logits, four-dimensional, with biases of their own, read as the model reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halving_models import (
    ENCODER_DECODER,
    MULTI_HEAD,
    cache_of,
    gemma,
    going_on,
    norms_in_float64,
    randomized,
    source_of,
    tokens,
)
from twofold.existing import halve, restore
from twofold.existing.key_rotations import is_seen, key_positions

FIRST, LENGTH, PADDING = 7, 12, 2


def added_mask(kind: str, heads: int) -> Tensor:
    """[2, 1 or H, S, S]: what may not be seen is the lowest number; the first text begins late, and of what is seen keys far away are seen less."""
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    allowed[0, :, :, :PADDING] = False
    allowed[0, :, :PADDING, :PADDING] = True  # padding sees padding: a row that sees nothing is no softmax
    behind = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if kind == "per head" else torch.tensor([0.5])
    bias = torch.zeros(1) if kind == "plain" else -slopes[:, None, None] * behind
    lowest = -torch.inf if kind == "infinite" else torch.finfo(torch.float64).min
    return torch.where(allowed, bias.double(), lowest)


@torch.no_grad()
def said(model: Any, mask: Tensor, positions: Tensor) -> list[Tensor]:
    """At once, and in three steps from a cache."""
    text = tokens(2, LENGTH)

    def rows(begin: int, until: int, cache: Any) -> Any:
        part = mask[:, :, begin:until, :until]
        per_kind = dict.fromkeys(set(getattr(model.config, "layer_types", None) or ()), part)
        given: Any = per_kind if model.config.model_type == "gemma4_text" else part
        asked = {"attention_mask": given, "position_ids": positions[:, begin:until], "use_cache": True}
        return model(text[:, begin:until], **asked, **({} if cache is None else going_on(model, cache)))

    whole, first = rows(0, LENGTH, None), rows(0, FIRST, None)
    further = rows(FIRST, LENGTH - 1, cache_of(first))
    last = rows(LENGTH - 1, LENGTH, cache_of(further))
    return [whole.logits, first.logits, further.logits, last.logits]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "infinite", "biased", "per head"])
@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt", "llama"])
def test_masks_that_are_added_to_the_logits(name: str, kind: str, attention: str):
    model = gemma(sliding_window=LENGTH + 1) if name == "gemma" else randomized(MULTI_HEAD[name]())
    model.set_attn_implementation(attention)
    mask = added_mask(kind, heads=4)
    counted = torch.arange(LENGTH).repeat(2, 1)
    counted[0] = (counted[0] - PADDING).clamp(min=0)
    with norms_in_float64():
        for positions in (counted, torch.arange(LENGTH).repeat(2, 1)):
            before = said(model, mask, positions)
            halve(model)
            after = said(model, mask, positions)
            for expected, found in zip(before, after, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            restore(model)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama", "opt"])
def test_padding_is_no_nan_in_half_precision(name: str):
    """Where every logit is far below zero, and the lowest number of float16 is near; padding sees nothing, and what it makes of that is cached."""
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name](), std=0.08)
    for layer in model.modules():
        if name == "gemma" and type(layer).__name__.endswith("Attention"):
            layer.q_norm.weight.data.mul_(16)
        elif type(layer).__name__ == "GPT2Attention":
            layer.c_attn.bias.data[:64] = torch.tensor([6.0, -6.0]).repeat_interleave(32)
        elif type(layer).__name__.endswith("Attention"):
            layer.q_proj.bias.data.fill_(6)
            layer.k_proj.bias.data.fill_(-6)
    model = model.half()
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    halve(model, max_error=9.0)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    logits = model.generate(tokens(2, 10), attention_mask=mask, pad_token_id=0, **options).logits
    assert torch.stack(logits).isfinite().all()


@pytest.mark.parametrize("name", ["bart", "t5", "umt5"])
def test_masks_of_decoders_that_are_added_to_the_logits(name: str):
    model = randomized(ENCODER_DECODER[name]())
    model.set_attn_implementation("eager")
    asked = source_of(name) | {
        "decoder_input_ids": tokens(2, LENGTH),
        "decoder_attention_mask": added_mask("biased", 4),
    }
    before = model(**asked).logits
    halve(model)
    torch.testing.assert_close(model(**asked).logits, before)


@settings(max_examples=200, deadline=None)
@given(
    padding=st.integers(0, 3),
    middle=st.sets(st.integers(4, 13)),
    total=st.integers(11, 15),
    new=st.integers(1, 4),
    window=st.integers(5, 20),
    room=st.integers(0, 3),
    skips=st.booleans(),
    floats=st.booleans(),
)
def test_every_key_that_is_seen_stands_where_it_stood(
    padding: int, middle: set[int], total: int, new: int, window: int, room: int, skips: bool, floats: bool
):
    """Against positions that are written down token by token: padding in front and in the middle, windows that let go, and room that is not filled."""
    real = torch.tensor([slot >= padding and slot not in middle for slot in range(total)])
    assume(real[total - new :].any())
    positions = torch.where(real, real.cumsum(0) - 1, 1) if skips else torch.arange(total)
    queries = torch.arange(total - new, total)
    behind = queries[:, None] - torch.arange(total)
    seen = real & (behind >= 0) & (behind < window)
    kept = min(total, window - 1 + new)
    if kept == total:
        seen, where = torch.nn.functional.pad(seen, (0, room)), torch.nn.functional.pad(positions, (0, room))
    else:
        seen, where = seen[:, total - kept :], positions[total - kept :]
    mask = torch.where(seen, -0.25, torch.finfo(torch.float32).min) if floats else seen
    visible, given = seen[real[total - new :]].any(dim=0), positions[None, total - new :]
    for rows, texts in ((1, 1), (1, 2), (2, 1)):  # of positions and of masks
        found = key_positions(seen.shape[1], total, given.repeat(rows, 1), mask.repeat(texts, 1, 1, 1))
        assert found.shape[0] == max(rows, texts)
        assert all(torch.equal(row[visible], where[visible]) for row in found)
    assert torch.equal(is_seen(mask), seen)


PARENTS = (-1, 0, 0, 1, 1, 2, 3, 5, 5, 6)
"""Of drafts: the first follows the text, the second and third are two ways to go on after it, and so forth."""
CUTS = ((0, 6), (6, 9), (9, 10))
"""The drafts of each pass: those of the second go on from branches of the first, those of the third from one of the second."""


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama", "gpt_neox"])
@torch.no_grad()
def test_drafts_that_are_a_tree(name: str, padding: int, added: bool):
    """Siblings stand at one position, in one pass and in those after it, and see none of each other."""
    model = gemma(sliding_window=64) if name == "gemma" else randomized(MULTI_HEAD[name]())
    text, drafts = tokens(2, FIRST), tokens(2, len(PARENTS), seed=1)
    mask = torch.ones(2, FIRST, dtype=torch.bool)
    mask[0, :padding] = False
    ancestors = torch.zeros(len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node, parent in enumerate(PARENTS):
        ancestors[node] = ancestors[parent] if parent >= 0 else False
        ancestors[node, node] = True
    positions = mask.sum(-1, keepdim=True) + ancestors.sum(-1) - 1

    def read() -> list[Tensor]:
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = cache_of(model(text, attention_mask=mask.long(), position_ids=counted, use_cache=True))
        logits = []
        for begin, until in CUTS:
            seen = ancestors[begin:until, :until].expand(2, 1, -1, -1)
            seen = torch.cat((mask[:, None, None].expand(-1, -1, until - begin, -1), seen), dim=-1)
            given: Any = torch.where(seen, 0.0, added_mask("plain", 1).min()) if added else seen
            if name == "gemma":
                given = dict.fromkeys(model.config.layer_types, given)
            asked = {"attention_mask": given, "position_ids": positions[:, begin:until]}
            logits.append(model(drafts[:, begin:until], **asked, **going_on(model, cache)).logits)
        return logits

    with norms_in_float64():
        before = read()
        halve(model)
        for expected, found in zip(before, read(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
