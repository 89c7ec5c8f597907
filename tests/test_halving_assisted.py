"""Drafts: a halved model checks them, a halved model makes them, Gemma 4's own assistant reads them off its cache, and prompts are looked up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from halving_models import (
    MULTI_HEAD,
    PER_LAYER_INPUTS,
    gemma,
    gemma_config,
    gemma_unified,
    norms_in_float64,
    randomized,
    tokens,
)
from twofold.errors import TwofoldError
from twofold.existing import halve

NEW = 12
# A draft's windows lose count in Transformers 5.17, halved or not: before 5.24 they are longer than the text.
WINDOW = 8 if Version(transformers.__version__) >= Version("5.24") else 64


def made(name: str, seed: int) -> Any:
    model = gemma(seed, sliding_window=WINDOW) if name == "gemma" else randomized(MULTI_HEAD[name](), seed)
    model.generation_config.eos_token_id = None
    return model


def draft_of(model: Any, noise: float = 0.02) -> Any:
    """A model that agrees with another now and then: the same weights, moved."""
    draft = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return draft


def answer(model: Any, text: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    asked = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(text, **asked)


def counted(model: Any) -> list[int]:
    """Fills up with the numbers of tokens that the model reads at once."""
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda *given: lengths.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    return lengths


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("halved", ["model", "draft", "both"])
@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_drafts_are_checked_and_made_by_halved_models(name: str, halved: str, sampled: bool):
    with norms_in_float64():
        model = made(name, 0)
        draft, text = draft_of(model), tokens(1, 14, seed=2)
        options = {"do_sample": True, "top_k": 0} if sampled else {}
        alone = answer(model, text)
        expected = answer(model, text, assistant_model=draft, **options)
        if halved != "draft":
            halve(model)
        if halved != "model":
            halve(draft)
        lengths = counted(model)
        assert torch.equal(answer(model, text, assistant_model=draft, **options), expected)
        assert len(lengths) < NEW  # drafts were taken
        if not sampled:
            assert torch.equal(expected, alone)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_prompts_are_looked_up(name: str, sampled: bool):
    with norms_in_float64():
        model, text = made(name, 1), tokens(1, 6, seed=3).repeat(1, 4)
        options = {"prompt_lookup_num_tokens": 4} | ({"do_sample": True, "top_k": 0} if sampled else {})
        expected = answer(model, text, **options)
        halve(model)
        lengths = counted(model)
        assert torch.equal(answer(model, text, **options), expected)
        assert max(lengths[1:]) > 1  # several at once, and those that were wrong forgotten


def assistant(model: Any) -> Any:
    """Two layers that have no keys and values of their own."""
    changes = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 0,
    }
    unified = type(model).__name__.startswith("Gemma4Unified")
    kind = transformers.Gemma4UnifiedAssistantConfig if unified else transformers.Gemma4AssistantConfig
    config = kind(text_config=gemma_config(**changes), backbone_hidden_size=model.config.hidden_size)
    made = transformers.Gemma4UnifiedAssistantForCausalLM if unified else transformers.Gemma4AssistantForCausalLM
    drafting = randomized(made(config), 5)
    drafting.generation_config.num_assistant_tokens = 3
    return drafting


@pytest.mark.parametrize("kind", ["gemma", "gemma that shares", "unified"])
@pytest.mark.parametrize("length", [5, 14])
def test_gemmas_own_assistant_reads_a_halved_cache(length: int, kind: str):
    shares: dict[str, Any] = {"num_kv_shared_layers": 3} | PER_LAYER_INPUTS
    with norms_in_float64():
        model = gemma_unified() if kind == "unified" else gemma(**(shares if kind == "gemma that shares" else {}))
        model.generation_config.eos_token_id = None
        drafting, text = assistant(model), tokens(1, length)
        read: list[list[Tensor]] = []

        def keep(_: Any, __: Any, options: dict[str, Any]) -> None:
            pairs = options["shared_kv_states"]
            read.append([options["inputs_embeds"], *(tensor for kind in sorted(pairs) for tensor in pairs[kind])])

        drafting.register_forward_pre_hook(keep, with_kwargs=True)
        alone = answer(model, text)
        expected = answer(model, text, assistant_model=drafting)
        before = read.copy()
        read.clear()
        halve(model)
        assert torch.equal(answer(model, text, assistant_model=drafting), expected)
        assert torch.equal(expected, alone)
        assert len(before) == len(read) > 0
        for wanted, found in zip(before, read, strict=True):
            for expected_tensor, tensor in zip(wanted, found, strict=True):
                torch.testing.assert_close(tensor, expected_tensor)
        with pytest.raises(TwofoldError, match="no cache of their own"):
            halve(drafting)
