"""A halved model is the model: the same logits through every way to use a cache, half the bytes where it says so, and itself again when restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from halving_models import (
    MULTI_HEAD,
    PER_LAYER_INPUTS,
    SIGNS,
    WINDOWED,
    cache_bytes,
    cache_of,
    diffusion_gemma,
    gemma,
    gemma_changes,
    gemma_unified,
    gemma_with_images,
    going_on,
    norms_in_float64,
    randomized,
    tokens,
)
from twofold.existing import HalvingReport, halve, restore

NEW = 6


def mask_of(batch: int, length: int, padding: int) -> Tensor:
    """The first text begins ``padding`` tokens late."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Tokens, their logits and the cache of a greedy answer."""
    answer = model.generate(
        max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
    )
    return answer.sequences, torch.stack(answer.logits), cache_of(answer)


@torch.no_grad()
def outcomes(model: Any, length: int, padding: int) -> dict[str, Tensor]:
    """What the model says in every way that a cache is filled and read."""
    text, mask = tokens(2, length), mask_of(2, length, padding)
    first = max(1, length // 2)
    said = {"whole": model(text).logits, "padded": model(text, attention_mask=mask).logits[mask.bool()]}
    cache = cache_of(model(text[:, :first], use_cache=True))
    said["continued"] = model(text[:, first:], **going_on(model, cache)).logits
    said["one more"] = model(text[:, :1], **going_on(model, cache)).logits
    alike = {"input_ids": text, "attention_mask": mask}
    said["greedy"], said["greedy logits"], _ = generated(model, **alike)
    said["static"], said["static logits"], _ = generated(
        model, cache_implementation="static", disable_compile=True, **alike
    )
    said["beams"], *_ = generated(model, num_beams=3, **alike)
    said["chunks"], said["chunk logits"], _ = generated(model, prefill_chunk_size=3, **alike)
    said["looked up"], *_ = generated(model, input_ids=text[:1], prompt_lookup_num_tokens=2)
    said["without"], *_ = generated(model, use_cache=False, **alike)
    return said


@pytest.mark.parametrize("name", ["gemma", "llama", "mistral"])
def test_padding_in_the_middle_of_a_text(name: str):
    with norms_in_float64():
        model = gemma() if name == "gemma" else randomized((WINDOWED | {"llama": MULTI_HEAD["llama"]})[name]())
        text, mask = tokens(2, 15), mask_of(2, 15, 2)
        mask[1, 4:7] = mask[1, 11:13] = 0
        alike = {"input_ids": text, "attention_mask": mask}
        before = generated(model, **alike)
        static = generated(model, cache_implementation="static", disable_compile=True, **alike)
        chunks = generated(model, prefill_chunk_size=6, **alike)
        # Positions that count the padding too, as a bare forward pass has them.
        first = cache_of(model(text[:, :9], attention_mask=mask[:, :9], use_cache=True))
        counted = model(text[:, 9:], attention_mask=mask, **going_on(model, first)).logits
        halve(model)
        for expected, found in (
            (before, generated(model, **alike)),
            (static, generated(model, cache_implementation="static", disable_compile=True, **alike)),
            (chunks, generated(model, prefill_chunk_size=6, **alike)),
        ):
            assert torch.equal(expected[0], found[0])
            torch.testing.assert_close(found[1], expected[1])
        first = cache_of(model(text[:, :9], attention_mask=mask[:, :9], use_cache=True))
        torch.testing.assert_close(
            model(text[:, 9:], attention_mask=mask, **going_on(model, first)).logits, counted, rtol=1e-5, atol=1e-5
        )


def check(before: dict[str, Tensor], after: dict[str, Tensor], bound: float) -> None:
    for name, expected in before.items():
        if expected.is_floating_point():
            torch.testing.assert_close(
                after[name], expected, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(after[name], expected), name


@settings(max_examples=4, deadline=None)
@given(changes=gemma_changes(), seed=st.integers(0, 99), length=st.integers(4, 24), padding=st.integers(0, 3))
def test_a_halved_gemma_is_the_gemma(changes: dict[str, Any], seed: int, length: int, padding: int):
    model = gemma(seed, **changes)
    with norms_in_float64():
        before = outcomes(model, length, padding)
        halve(model)
        check(before, outcomes(model, length, padding), 1e-8)
        restore(model)
        again = outcomes(model, length, padding)
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_the_classes_of_the_12b_model_are_halved_too():
    model = gemma_unified()
    with norms_in_float64():
        before, whole = outcomes(model, 17, 3), sum(cache_bytes(cache_of(model(tokens(1, 30), use_cache=True))))
        report = halve(model)
        assert [layer.is_halved for layer in report.layers] == [False, False, True] * 2
        check(before, outcomes(model, 17, 3), 1e-8)
        assert sum(cache_bytes(cache_of(model(tokens(1, 30), use_cache=True)))) == whole - 2 * 30 * 32 * 8
        restore(model)
        again = outcomes(model, 17, 3)
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "keep"), [*((name, "keys") for name in MULTI_HEAD), ("gpt2", "values"), ("opt", "values")]
)
def test_a_halved_multi_head_model_is_the_model(name: str, keep: Any):
    model = randomized(MULTI_HEAD[name]())
    before = outcomes(model, 13, 3)
    report = halve(model, keep=keep)
    assert {layer.kept for layer in report.layers} == {keep}
    # Llama's norms compute in float32, so the last bit of a float64 number may come out as one of float32.
    check(before, outcomes(model, 13, 3), 1e-8 if name in ("gpt2", "opt", "gpt_neox", "phi") else 1e-5)
    restore(model)
    again = outcomes(model, 13, 3)
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("length", [4, 13])
@pytest.mark.parametrize("name", WINDOWED)
def test_multi_head_layers_with_windows(name: str, length: int):
    model = randomized(WINDOWED[name]())
    before = outcomes(model, length, 3)
    report = halve(model)
    assert [layer.window_tokens for layer in report.layers] == {"mistral": [5, 5], "qwen2": [0, 6]}[name]
    check(before, outcomes(model, length, 3), 1e-5)
    restore(model)
    assert all(torch.equal(found, before[what]) for what, found in outcomes(model, length, 3).items())


def ratio(model: Any, length: int) -> tuple[list[int], list[int], HalvingReport]:
    """Bytes per layer of the real cache before and after, with what is said of it."""
    text = tokens(2, length)
    before = cache_bytes(cache_of(model(text, use_cache=True)))
    report = halve(model)
    return before, cache_bytes(cache_of(model(text, use_cache=True))), report


def test_full_layers_hold_half_and_sliding_layers_what_they_held():
    model = gemma()
    before, after, report = ratio(model, 30)
    kinds = model.config.layer_types
    assert [b // a for b, a in zip(before, after, strict=True)] == [
        2 if kind == "full_attention" else 1 for kind in kinds
    ]
    window = model.config.sliding_window - 1  # what Transformers keeps of it
    counted = sum(
        2 * min(30, window) * 2 * 2 * 16 * 8 if kind != "full_attention" else 2 * 30 * 32 * 8 for kind in kinds
    )
    assert sum(after) == counted
    assert report.num_halved == 2


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_the_report_counts_the_bytes_that_are_held(name: str):
    model = randomized(MULTI_HEAD[name]())
    before, after, report = ratio(model, 11)
    assert sum(before) == 2 * report.cache_bytes(11, halved=False)
    assert sum(after) == 2 * report.cache_bytes(11) == sum(before) // 2


def test_layers_that_share_a_cache_read_the_halved_one():
    changes = PER_LAYER_INPUTS | {
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
    }
    with norms_in_float64():
        model = gemma(**changes)
        before = outcomes(model, 12, 0)
        report = halve(model)
        assert len(report.layers) == 3  # those with a cache of their own
        check(before, outcomes(model, 12, 0), 1e-8)


def test_what_a_drafting_model_reads_is_handed_on():
    with norms_in_float64():
        model = gemma(num_kv_shared_layers=3, **PER_LAYER_INPUTS)
        text = tokens(1, 9)
        before = model.model(text, use_cache=True, return_shared_kv_states=True).shared_kv_states
        halve(model)
        after = model.model(text, use_cache=True, return_shared_kv_states=True).shared_kv_states
    for name, pair in before.items():
        for expected, found in zip(pair, after[name], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_the_halved_gemma_differs_no_more_than_the_gemma_itself(dtype: torch.dtype):
    exact = gemma(3)
    model = copy.deepcopy(exact).to(dtype)
    text = tokens(4, 40, seed=5)

    @torch.no_grad()
    def logits(of: nn.Module) -> Tensor:
        """Of the second half, token by token from a cache."""
        model: Any = of
        cache = cache_of(model(text[:, :20], use_cache=True))
        steps = [model(text[:, [at]], **going_on(model, cache)).logits for at in range(20, 40)]
        return torch.cat(steps, dim=1).double()

    truth, own = logits(exact), logits(model)
    halve(model)
    noise, halved = ((found - truth).square().mean().sqrt() for found in (own, logits(model)))
    assert halved <= 1.5 * noise


def test_eager_attention_gives_its_weights():
    model = randomized(MULTI_HEAD["gpt2"]())
    model.set_attn_implementation("eager")
    text = tokens(2, 7)
    before = model(text, output_attentions=True).attentions
    halve(model)
    after = model(text, output_attentions=True).attentions
    for expected, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_wrapper_with_images_is_halved_where_its_text_is():
    model = gemma_with_images()
    with norms_in_float64():
        before, logits, cache = generated(model, input_ids=tokens(2, 14))
        report = halve(model)
        after, halved, half = generated(model, input_ids=tokens(2, 14))
    assert torch.equal(before, after)
    torch.testing.assert_close(halved, logits)
    assert report.num_halved == 2
    assert sum(cache_bytes(half)) < sum(cache_bytes(cache))


@pytest.mark.parametrize("bidirectional", [None, "vision"])
def test_images_in_a_padded_batch(bidirectional: str | None):
    """Whose tokens may see one another, before and behind."""
    model = gemma_with_images(use_bidirectional_attention=bidirectional)
    text, mask = tokens(2, 20), mask_of(2, 20, 5)
    text[:, 7], text[:, 12] = SIGNS["boi_token_id"], SIGNS["eoi_token_id"]
    text[:, 8:12] = SIGNS["image_token_id"]
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1)
    given = {
        "input_ids": text,
        "attention_mask": mask,
        "pixel_values": torch.rand(2, 16, 12, dtype=torch.float64),
        "image_position_ids": places,
        "mm_token_type_ids": (text == SIGNS["image_token_id"]).long(),
    }
    with norms_in_float64():
        before, logits, cache = generated(model, **given)
        of_another = generated(model, **given | {"pixel_values": given["pixel_values"].flip(1)})[1]
        halve(model)
        after, halved, half = generated(model, **given)
    assert torch.equal(before, after)
    torch.testing.assert_close(halved, logits)
    assert not torch.allclose(of_another, logits)
    assert sum(cache_bytes(half)) < sum(cache_bytes(cache))


@torch.no_grad()
def test_a_decoder_that_refines_text_beside_an_encoders_cache():
    model = diffusion_gemma()

    def refined() -> tuple[list[Tensor], Any]:
        first = model(input_ids=tokens(2, 14), decoder_input_ids=tokens(2, 6, seed=3))
        again = model(decoder_input_ids=first.logits.argmax(-1), **going_on(model, cache_of(first)))
        further = model(input_ids=tokens(2, 6), decoder_input_ids=tokens(2, 6), **going_on(model, cache_of(again)))
        return [first.logits, again.logits, further.logits], cache_of(further)

    before, cache = refined()
    report = halve(model)
    after, half = refined()
    for expected, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [layer.is_halved for layer in report.layers] == [False, False, True]
    assert [b // a for b, a in zip(cache_bytes(cache), cache_bytes(half), strict=True)] == [1, 1, 2]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what this generate imports
@torch.no_grad()
def test_text_that_is_refined_block_by_block():
    """Its own way to generate: the decoder reads its last guesses again and again beside the cache, then the encoder caches the block."""
    model = diffusion_gemma().double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.4)  # guesses that are read again let no difference grow

    def made() -> Tensor:
        torch.manual_seed(0)
        return model.generate(tokens(2, 14), max_new_tokens=12).sequences

    with norms_in_float64():
        before = made()
        assert before.shape == (2, 14 + 2 * 6)
        halve(model)
        assert torch.equal(made(), before)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_a_model_that_was_trained_here_says_the_same_and_predicts_as_well(name: str):
    torch.manual_seed(0)
    model: Any = (gemma() if name == "gemma" else MULTI_HEAD[name]()).float()
    text = torch.tensor([*(Path(__file__).parent.parent / "README.md").read_bytes()]) % 96 + 3
    rows = text[: len(text) // 33 * 33].view(-1, 33)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = last = 0.0
    for index in range(60):
        loss = model(rows[index % 8 :: 8], labels=rows[index % 8 :: 8]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < first - 0.5  # it has learned something
    model.eval()

    def said() -> tuple[float, Tensor]:
        cache = cache_of(model(rows[:8, :16], use_cache=True))
        logits = model(rows[:8, 16:], **going_on(model, cache)).logits[:, :-1]
        bits = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:8, 17:].flatten()).item()
        return bits, generated(model, input_ids=rows[:2, :16])[0]

    with torch.no_grad():
        bits, answer = said()
        halve(model)
        bits_halved, answer_halved = said()
    assert torch.equal(answer, answer_halved)
    assert abs(bits_halved - bits) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_one_compiled_graph_serves_all_tokens(name: str):
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name]())
    text = tokens(1, 9)
    expected = generated(model, input_ids=text, cache_implementation="static", disable_compile=True)[0]
    halve(model)
    torch._dynamo.reset()
    graphs = CompileCounter()
    model.forward = torch.compile(model.forward, backend=graphs)
    try:
        found = generated(model, input_ids=text, cache_implementation="static", disable_compile=True)[0]
    finally:
        del model.forward
    assert torch.equal(expected, found)
    assert graphs.frame_count <= 3  # the prompt, the first token, and all that follow
