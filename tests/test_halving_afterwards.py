"""What is done with a model once it is halved: threads, copies, files, other dtypes, adapters, autocast."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import cache_utils

from halving_models import (
    ENCODER_DECODER,
    MULTI_HEAD,
    WINDOWED,
    cache_bytes,
    cache_of,
    gemma,
    going_on,
    norms_in_float64,
    randomized,
    source_of,
    tokens,
)
from twofold.errors import TwofoldError
from twofold.existing import halve, restore
from twofold.existing.key_rotations import KeyRotations
from twofold.existing.low_bits import quantized_cache

NAMES = ("gemma", "gpt2", "llama")


def made(name: str, **options: Any) -> Any:
    return gemma() if name == "gemma" else randomized((MULTI_HEAD | ENCODER_DECODER)[name](), **options)


def answer(model: Any, text: Tensor) -> Tensor:
    return model.generate(text, max_new_tokens=9, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", NAMES)
def test_several_threads_generate_at_once(name: str):
    """Each with a cache of its own, and with texts of lengths of their own; the tables of rotations are made anew while others read them."""
    model = made(name)
    halve(model)
    texts = [tokens(1, 5 + 7 * index, seed=index) for index in range(6)]
    expected = [answer(model, text) for text in texts]
    for _ in range(3):
        restore(model)
        halve(model)
        found: dict[int, Tensor] = {}

        def work(index: int, found: dict[int, Tensor] = found) -> None:
            found[index] = answer(model, texts[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], expected[index]) for index in range(len(texts)))


def test_a_table_that_another_thread_makes_shorter():
    class Raced(dict):
        """Another thread puts its own, of one position, in the place of each that is put in."""

        def __setitem__(self, key: Any, rotation: Any) -> None:
            shorter = type(rotation)(
                cosine=rotation.cosine[:, :, :1], sine=rotation.sine[:, :, :1], distance=rotation.distance
            )
            super().__setitem__(key, shorter)

    rotary = made("llama").model.rotary_emb
    raced, alone = (KeyRotations.of(rotary, None, 8) for _ in range(2))
    raced._tables = Raced()
    positions, like = torch.arange(7)[None], torch.zeros(1, dtype=torch.float64)
    assert torch.equal(raced.at(positions, like).cosine, alone.at(positions, like).cosine)


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_model_is_halved_by_itself(name: str):
    model = made(name)
    halve(model)
    other = copy.deepcopy(model)
    restore(model)
    text = tokens(1, 20)
    whole, half = (sum(cache_bytes(cache_of(one(text, use_cache=True)))) for one in (model, other))
    assert half < whole
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other(text).logits.abs().max() > 0


@pytest.mark.parametrize("name", [*NAMES, "t5", "bart"])
def test_what_is_saved_is_the_model_as_it_was(name: str, tmp_path: Path):
    model = made(name).float()
    asked = (
        source_of(name) | {"decoder_input_ids": tokens(2, 5)}
        if name in ENCODER_DECODER
        else {"input_ids": tokens(2, 12)}
    )
    before = model(**asked).logits
    model.save_pretrained(tmp_path / "before")
    halve(model)
    halved = model(**asked).logits
    model.save_pretrained(tmp_path / "halved")
    config, weights = ((tmp_path / "halved" / file).read_bytes() for file in ("config.json", "model.safetensors"))
    assert (tmp_path / "before" / "config.json").read_bytes() == config
    assert (
        load_file(tmp_path / "before" / "model.safetensors").keys()
        == load_file(tmp_path / "halved" / "model.safetensors").keys()
    )
    assert (tmp_path / "before" / "model.safetensors").read_bytes() == weights
    loaded = type(model).from_pretrained(tmp_path / "halved", dtype=torch.float32).eval()
    assert torch.equal(loaded(**asked).logits, before)
    halve(loaded)
    assert torch.equal(loaded(**asked).logits, halved)
    restore(loaded)
    assert torch.equal(loaded(**asked).logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_changes_its_dtype(name: str):
    """The map follows, and so do the tables of rotations."""
    model = made(name, std=0.1) if name != "gemma" else made(name)
    text = tokens(2, 20)
    with norms_in_float64():
        before = model(text).logits
        halve(model, max_error=1.0)
        model.float()
        single = answer(model, text)
        rounded = copy.deepcopy(model).bfloat16()
        assert answer(rounded, text).shape == single.shape
        model.double()
        cache = cache_of(model(text[:, :12], use_cache=True))
        torch.testing.assert_close(
            model(text[:, 12:], **going_on(model, cache)).logits, before[:, 12:], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_a_dtype_in_which_more_is_lost_than_was_allowed(how: str):
    model, text = made("llama").float(), tokens(1, 9)
    report = halve(model, max_error=1e-3)
    allowed = max(layer.measured_error for layer in report.layers) < 1e-3
    assert allowed
    assert answer(model, text).shape == (1, 18)
    with pytest.raises(
        TwofoldError, match=r"In bfloat16 rounding .* more than max_error = 0.001: call twofold.restore"
    ):
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(text)
        else:
            model.bfloat16()(text)
    model(text, use_cache=False)  # no value is made of a rounded key
    model.double()
    assert answer(model, text).shape == (1, 18)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_trained_again(name: str):
    model, text = made(name), tokens(1, 9)
    before = answer(model, text)
    halve(model)
    cache = cache_of(model(text, use_cache=True))
    model.train()
    with pytest.raises(TwofoldError, match=r"serves inference.*model.eval\(\), or twofold.restore\(model\)"):
        model(text, **going_on(model, cache))
    model.eval()
    assert torch.equal(answer(model, text), before)
    model.train()
    restore(model)
    model(text, labels=text).loss.backward()


@pytest.mark.parametrize("how", ["load_state_dict", "an optimizer", "in place"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_that_are_written_to_afterwards(name: str, how: str):
    """The map was made of what they were; queries and outputs are read as they are."""
    model, other, text = made(name), randomized(MULTI_HEAD[name](), 3), tokens(1, 9)
    halve(model)
    answer(model, text)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif how == "an optimizer":
        model(text, labels=text).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        with torch.no_grad():
            layer = next(part for part in model.modules() if type(part).__name__.endswith("Attention"))
            next(layer.parameters()).mul_(2) if name == "gpt2" else layer.v_proj.weight.mul_(2)
    with pytest.raises(TwofoldError, match="written to since it was halved"):
        answer(model, text)
    restore(model)
    expected = answer(model, text)
    halve(model)
    assert torch.equal(answer(model, text), expected)


def test_numbers_that_are_where_others_were_are_not_written_to():
    """As memory is given out again: a bias that was written thrice may come to lie where a weight lay that was written once."""
    model = made("gpt2").float()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.mul_(1).mul_(1).mul_(1)
    halve(model)
    forward = model.transformer.h[0].attn.forward
    (weight, written), (bias, rewritten) = forward.version
    assert rewritten > written
    forward.version = [(bias, written), (weight, rewritten)]
    answer(model, tokens(1, 9))


@pytest.mark.parametrize("when", ["halved", "followed"])
@pytest.mark.parametrize("name", NAMES)
def test_what_inference_mode_made_serves_gradients_too(name: str, when: str):
    model, text = made(name), tokens(1, 9)
    if when == "followed":
        halve(model)
        model.float()
    with torch.inference_mode():
        if when == "halved":
            halve(model)
        answer(model, text)
    cache = cache_of(model(text[:, :5], use_cache=True))
    model(text[:, 5:], **going_on(model, cache)).logits.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_a_pickle_is_halved_by_itself(name: str):
    model, text = made(name), tokens(1, 20)
    halve(model)
    expected, half = answer(model, text), cache_bytes(cache_of(model(text, use_cache=True)))
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(answer(other, text), expected)
    assert cache_bytes(cache_of(other(text, use_cache=True))) == half
    restore(other)
    assert torch.equal(answer(other, text), expected)
    assert sum(cache_bytes(cache_of(other(text, use_cache=True)))) > sum(half)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_was_compiled_before(name: str):
    """Its graph is not that of the model as it was."""
    model, text = made(name), tokens(1, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")

    @torch.no_grad()
    def held() -> int:
        return sum(cache_bytes(cache_of(compiled(text, use_cache=True))))

    whole = held()
    halve(model)
    assert held() == sum(cache_bytes(cache_of(model(text, use_cache=True)))) < whole
    restore(model)
    assert held() == whole


def test_adapters_that_come_afterwards():
    peft = pytest.importorskip("peft")
    model = made("llama").float()
    halve(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"], r=2)).eval()
    with pytest.raises(TwofoldError, match=r"replaced since it was halved.*merge its adapters"):
        adapted(tokens(1, 4))
    restore(model)
    adapted(tokens(1, 4))
    merged = adapted.merge_and_unload().eval()
    before = answer(merged, tokens(1, 9))
    halve(merged)
    assert torch.equal(answer(merged, tokens(1, 9)), before)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str):
    """Float32 weights and products in bfloat16 differ from the exact model about as much as they did; multi-head keys make their rounding larger."""
    model = (made(name, std=0.1) if name != "gemma" else made(name)).float()
    text = tokens(4, 40, seed=5)

    @torch.no_grad()
    def logits() -> Tensor:
        cache = cache_of(model(text[:, :20], use_cache=True))
        steps = [model(text[:, [at]], **going_on(model, cache)).logits for at in range(20, 40)]
        return torch.cat(steps, dim=1).double()

    exact = logits()
    with torch.autocast("cpu", torch.bfloat16):
        own = logits()
        halve(model, max_error=1.0)
        halved = logits()
    noise, found = ((rounded - exact).square().mean().sqrt() for rounded in (own, halved))
    assert noise > 0
    assert found < (1.5 if name == "gemma" else 8) * noise


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_projections_are_made_once(name: str):
    model = made(name)
    halve(model)
    calls: list[str] = []
    parts = ("c_attn", "query_key_value", "q_proj", "k_proj", "v_proj")
    for module_name, module in model.named_modules():
        if module_name.endswith(parts):
            module.register_forward_hook(lambda *_, name=module_name: calls.append(name))
    cache = cache_of(model(tokens(1, 4), use_cache=True))
    model(tokens(1, 1), **going_on(model, cache))
    assert calls
    assert all(calls.count(name) == 2 for name in calls)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_error_that_is_reported_is_the_error_that_is_made(name: str):
    """In bfloat16, of the running layer: rounded keys, a rounded map, and the product of the two."""
    exact = made(name)
    model = copy.deepcopy(exact).bfloat16()
    report = halve(model, keep="keys", max_error=1.0)
    for layer in report.layers:
        attention, own = (one.get_submodule(layer.name) for one in (model, exact))
        draw = torch.Generator().manual_seed(3)
        inputs = torch.randn(8, 64, 32, dtype=torch.float64, generator=draw).bfloat16()
        for part in own.children():
            part.load_state_dict({key: value.bfloat16().double() for key, value in part.state_dict().items()})
        _, key, value = (
            own.c_attn(inputs.double()).split(32, dim=-1)
            if name == "gpt2"
            else (None, own.k_proj(inputs.double()), own.v_proj(inputs.double()))
        )
        found = attention.forward._made(attention.forward._heads(key.bfloat16()))
        wanted = attention.forward._heads(value)
        error = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert 0.85 < error / layer.measured_error < 1.2
        assert 0.6 < layer.predicted_error / layer.measured_error < 1.7


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama", "qwen2"])
def test_one_tensor_in_few_bits(name: str, bits: int):
    """Those of full attention: the others of qwen2, whose windows are short, stay as they are computed."""
    model = (gemma() if name == "gemma" else randomized((MULTI_HEAD | WINDOWED)[name](), std=0.1)).float()
    text = tokens(1, 48)
    halve(model)
    exact = model(text).logits
    cache = quantized_cache(model, bits=bits, group_size=8, tail_tokens=4)
    model(text[:, :40], **going_on(model, cache))
    rounded = model(text[:, 40:], **going_on(model, cache)).logits
    error = (rounded - exact[:, 40:]).square().mean().sqrt() / exact[:, 40:].square().mean().sqrt()
    assert 0 < error < (0.05 if bits == 8 else 0.6)
    kinds = [hasattr(layer, "old") for layer in cache.layers]
    assert kinds == {"gemma": [False, False, True] * 2, "qwen2": [True, False]}.get(name, [True, True])
    assert name != "qwen2" or cache.layers[1].keys.shape[2] < 48
    halved = next(layer for layer in cache.layers if hasattr(layer, "old"))
    codes = sum(old.codes.nbytes for old in halved.old)
    assert codes == 44 * halved.tail[0].shape[1] * halved.tail[0].shape[3] * bits // 8


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this Transformers has no such cache")
def test_a_cache_that_quantizes_keys_and_values_apart():
    model = made("gpt2").float()
    halve(model)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with pytest.raises(TwofoldError, match=r"not held by a Fp8QuantizedLayer: .*twofold\.existing\.low_bits"):
        model.generate(tokens(1, 9), max_new_tokens=3, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_in_pages(name: str):
    """What ``generate_batch`` makes: nothing of a Cache, but ``update``."""

    class PagedAttentionCache:
        def update(self, *_: Any) -> None:
            pytest.fail("it was given one tensor")

    model = made(name)
    halve(model)
    layer = next(part for part in model.modules() if vars(part).get("_twofold_forward", 0) is None)
    position = (torch.ones(1, 2, 32, dtype=torch.float64),) * 2
    with pytest.raises(TwofoldError, match=r"not held by a PagedAttentionCache: call generate"):
        layer(
            torch.zeros(1, 2, 32, dtype=torch.float64),
            position_embeddings=position,
            attention_mask=None,
            past_key_values=PagedAttentionCache(),
        )


def test_a_quantized_cache_has_groups():
    model: Any = gemma()
    halve(model)
    for options, says in (
        ({"axis": "head", "tail_tokens": 0}, "models of Twofold's own"),
        ({"bits": 3}, "cache of 3 bits cannot be had"),
        ({"axis": "row"}, "axis is 'row'"),
    ):
        with pytest.raises(TwofoldError, match=says):
            quantized_cache(model, **options)


def test_a_quantized_cache_is_one_cache():
    model = made("bart")
    halve(model)
    with pytest.raises(TwofoldError, match="needs two caches"):
        quantized_cache(model)
