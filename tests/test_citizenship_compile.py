"""``torch.compile``: training and the reading of a prompt are one graph each, with the numbers of the model as it is.

Decoding from a pre-allocated cache, compiled once for every token, is held in test_cache_kinds.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM

from attention_strategies import POSITIONS
from model_strategies import FAMILIES, GPT2, LLAMA, drawn_inputs, drawn_model, drawn_tokens, recompute_layers
from twofold.cache import TiedCache
from twofold.cost import cache_bytes
from twofold.spec import ModelSpec

QUIET = pytest.mark.filterwarnings("ignore")  # the compiler's own warnings


def cases(values: Mapping[str, Any], quick: Collection[str]) -> list[Any]:
    """Every value traced into a graph and compiled to machine code; what is not ``quick`` only in the long run."""
    traced = [
        pytest.param(value, "eager", id=name, marks=[] if name in quick else pytest.mark.long)
        for name, value in values.items()
    ]
    built = [
        pytest.param(value, "inductor", id=f"{name}-built", marks=[pytest.mark.long, QUIET])
        for name, value in values.items()
    ]
    return traced + built


PROMPTED = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "windows": GPT2.with_changes(window_tokens=(3, 0)),
    "stream": LLAMA.with_changes(positions=POSITIONS["stream"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"], num_key_value_heads=1),
    "bias": LLAMA.with_changes(positions=POSITIONS["bias"]),
}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2, 2]])
TRAINED_WITH: dict[str, dict[str, Any]] = {
    "mask": {"attention_mask": MASK},
    "documents": {"document_ids": DOCUMENTS},
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1]])},
    "count": {"num_items_in_batch": torch.tensor(11)},
    "record": {"output_hidden_states": True, "output_attentions": True},
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def compiled(model: nn.Module, backend: Any, **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_trains_alike(model: nn.Module, backend: Any, inputs: dict[str, Any]) -> None:
    output, wanted = compiled(model, backend)(**inputs), model(**inputs)
    assert_near(output.loss, wanted.loss)
    assert_near(output.logits, wanted.logits)
    for found, gradient in zip(gradients(model, output.loss), gradients(model, wanted.loss), strict=True):
        assert_near(found, gradient)


@pytest.mark.parametrize(("spec", "backend"), cases(FAMILIES, quick=("llama",)))
def test_training_is_one_graph(spec: ModelSpec, backend: str):
    assert_trains_alike(drawn_model(spec).train(), backend, drawn_inputs(spec))


@pytest.mark.parametrize(("options", "backend"), cases(TRAINED_WITH, quick=("mask",)))
def test_whatever_training_is_given(options: dict[str, Any], backend: str):
    tokens = drawn_tokens(2, 7)
    assert_trains_alike(drawn_model(LLAMA).train(), backend, {"input_ids": tokens, "labels": tokens, **options})


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_implementation_of_attention(implementation: str):
    model = drawn_model(LLAMA).train()
    model.set_attn_implementation(implementation)
    assert_trains_alike(model, "eager", drawn_inputs(LLAMA))


@pytest.mark.long
def test_layers_that_are_computed_again():
    model = drawn_model(LLAMA).train()
    recompute_layers(model)
    assert_trains_alike(model, "eager", drawn_inputs(LLAMA))


def test_a_step_of_another_batch_is_the_same_graph():
    model = drawn_model(LLAMA).train()
    counter = CompileCounterWithBackend("eager")
    step = compiled(model, counter)
    for seed in range(4):
        tokens = drawn_tokens(2, 7, seed)
        assert_near(step(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
    assert counter.frame_count == 1
    for length in (8, 9, 10, 12):  # one more graph serves every other length
        tokens = drawn_tokens(2, length)
        assert_near(step(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
    assert counter.frame_count == 2


def cache_of(output: Any) -> TiedCache:
    return output["cache" if "cache" in output else "past_key_values"]


@pytest.mark.parametrize(("spec", "backend"), cases(PROMPTED, quick=("windows",)))
@torch.no_grad()
def test_the_reading_of_a_prompt_is_one_graph(spec: ModelSpec, backend: str):
    """With its cache, which goes on as one that was filled without compilation."""
    model, tokens = drawn_model(spec), drawn_tokens(2, 9)
    wanted = model(tokens, use_cache=False).logits
    output = compiled(model, backend)(tokens[:, :7], use_cache=True, logits_to_keep=1)
    assert_near(output.logits, wanted[:, 6:7])
    cache = cache_of(output)
    assert cache.nbytes == cache_bytes(spec, 7, "fp64", batch=2)
    for place in (7, 8):
        assert_near(model(tokens[:, place : place + 1], cache=cache).logits, wanted[:, place : place + 1])


@pytest.mark.long
@torch.no_grad()
def test_a_prompt_with_padding_is_one_graph():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 7)
    wanted = model(tokens, attention_mask=MASK, use_cache=True)
    output = compiled(model, "eager")(tokens, attention_mask=MASK, use_cache=True)
    assert_near(output.logits[MASK.bool()], wanted.logits[MASK.bool()])
    for found, stream in zip(cache_of(output), cache_of(wanted), strict=True):
        for one, other in zip(found, stream, strict=True):
            assert_near(one[:, :, 2:], other[:, :, 2:])


@pytest.mark.parametrize(
    "model_type", ["mistral", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "gpt2"))]
)
@torch.no_grad()
def test_other_models_through_our_kernels_are_one_graph(model_type: str):
    sizes = {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 19,
    }
    grouped = {} if model_type == "gpt2" else {"num_key_value_heads": 2, "head_dim": 6}
    window = {"sliding_window": 3} if model_type == "mistral" else {}
    tokens = drawn_tokens(2, 7)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, **grouped, **window)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="twofold").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for mask in (torch.ones_like(MASK), MASK):
        wanted = model(tokens, attention_mask=mask, use_cache=False).logits
        found = compiled(model, "eager")(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
