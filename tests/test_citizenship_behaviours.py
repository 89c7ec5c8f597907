"""What Transformers' own tests ask of a model, in short, for a plain clone without them (test_citizenship_mixins.py runs the tests themselves).

What else is on their list is held elsewhere: saving, loading, dtypes and device maps in test_model_files.py; every way to generate, caches of every
kind and continuing from them in test_generation.py and test_cache_kinds.py; first weights, resized vocabularies and hidden states in
test_models.py and test_language_model.py; implementations of attention in test_citizenship_attention.py; training in test_citizenship_trainer.py.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_strategies import POSITIONS
from model_strategies import FAMILIES, GPT2, LLAMA, drawn_inputs, drawn_model, drawn_tokens, recompute_layers
from twofold.errors import TwofoldError
from twofold.models import TwofoldConfig, TwofoldForCausalLM, TwofoldPreTrainedModel
from twofold.models.quiet import without_bars
from twofold.spec import ModelSpec

UNTIED = GPT2.with_changes(tie_word_embeddings=False)
ATTENDING = {
    **FAMILIES,
    "windows": UNTIED.with_changes(window_tokens=(3, 0)),
    "stream": LLAMA.with_changes(positions=POSITIONS["stream"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"], num_key_value_heads=1),
    "bias": LLAMA.with_changes(positions=POSITIONS["bias"]),
}


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with without_bars():
        yield


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# Outputs


@pytest.mark.parametrize("name", ATTENDING)
@torch.no_grad()
def test_attention_weights_are_given_where_they_are_asked_for(name: str):
    """They are those by which the layers attend: with them the first layer's output is computed anew."""
    spec = ATTENDING[name]
    model, inputs = drawn_model(spec), drawn_inputs(spec)
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert model(**inputs).get("attentions") is None
    assert_near(output.logits, model(**inputs).logits)
    tokens = output.hidden_states[0].shape[1]
    for index, weights in enumerate(output.attentions):
        assert weights.shape == (3, spec.num_attention_heads, tokens, tokens)
        assert_near(weights.sum(dim=-1), torch.ones(3, spec.num_attention_heads, tokens).double())
        if spec.causal:
            assert not weights.triu(1).any()
        if window := spec.attention(index).window_tokens:
            assert not weights.tril(-window).any()
    if name in ("gpt2", "llama", "image", "windows"):  # where values are what the projection gives
        layer = model.trunk.layers[0]
        attention, states = layer.attention, layer.attention_norm(output.hidden_states[0])
        projection = attention.v_proj if hasattr(attention, "v_proj") else attention.k_proj
        values = projection(states).unflatten(2, (-1, spec.head_dim)).transpose(1, 2)
        values = values.repeat_interleave(spec.num_attention_heads // spec.num_key_value_heads, dim=1)
        attended = attention.o_proj((output.attentions[0] @ values).transpose(1, 2).flatten(2))
        assert_near(attention(states), attended)


def test_attention_weights_in_training_and_beside_a_mask():
    model = drawn_model(LLAMA).train()
    recompute_layers(model)
    tokens = drawn_tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    output = model(tokens, attention_mask=mask, labels=tokens, output_attentions=True)
    assert len(output.attentions) == 2
    assert not output.attentions[1][0, :, 2:, :2].any()
    output.loss.backward()
    model.config.output_attentions = False
    assert model(tokens).get("attentions") is None


def test_a_kernel_that_has_no_weights_says_so():
    model, tokens = drawn_model(LLAMA, backend="sdpa"), drawn_tokens(2, 5)
    with pytest.raises(TwofoldError, match="sdpa: it keeps no attention weights"):
        model(tokens, output_attentions=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(tokens).attentions) == 2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_tuple_holds_what_the_dictionary_holds(family: str):
    model, inputs = drawn_model(FAMILIES[family]), drawn_inputs(FAMILIES[family])
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    as_dictionary = model(**inputs, **options)
    as_tuple = model(**inputs, **options, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, wanted in zip(as_tuple, as_dictionary.to_tuple(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(family: str):
    model, inputs = drawn_model(FAMILIES[family]), drawn_inputs(FAMILIES[family])
    inputs.pop("labels")
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).logits
        assert_near(alone, together[row : row + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter_and_what_lies_between(family: str):
    model, inputs = drawn_model(FAMILIES[family]).train(), drawn_inputs(FAMILIES[family])
    model.enable_input_require_grads()
    output = model(**inputs, output_hidden_states=True)
    for states in output.hidden_states:
        states.retain_grad()
    output.loss.backward()
    assert all(states.grad is not None and states.grad.any() for states in output.hidden_states)
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    keys_bias = "attention.k_proj.bias"  # moves all logits of a query by one number, which the softmax does not see
    assert [name for name in without if keys_bias not in name] == []


# Inputs


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_tokens():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 5)
    embedded = model.get_input_embeddings()(tokens)
    assert_near(model(inputs_embeds=embedded).logits, model(tokens).logits)


@pytest.mark.parametrize("spec", [GPT2, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_positions_that_begin_again_say_what_is_packed(spec: ModelSpec):
    """As collators without padding give them; a document reads as if it were alone."""
    model, tokens = drawn_model(spec), drawn_tokens(1, 9)
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    packed = model(tokens, position_ids=places).logits
    for start, end in ((0, 3), (3, 5), (5, 9)):
        assert_near(packed[:, start:end], model(tokens[:, start:end]).logits)
    two = model(tokens.repeat(2, 1), position_ids=places).logits  # said once for all rows
    assert_near(two[1:], packed)
    loss = model(tokens, position_ids=places, labels=tokens).loss
    assert_near(loss, model(tokens, document_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]]), labels=tokens).loss)


@torch.no_grad()
def test_positions_that_the_model_counts_itself_may_be_said():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    wanted = model(tokens, attention_mask=mask).logits[mask.bool()]
    for filling in (0, 1):  # of what stands at padding nobody is agreed
        places = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, filling)
        assert_near(model(tokens, attention_mask=mask, position_ids=places).logits[mask.bool()], wanted)
    whole = model(tokens, position_ids=torch.arange(5)[None])
    assert whole.get("cache") is not None or whole.get("past_key_values") is not None
    assert_near(whole.logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"position_ids": torch.tensor([[1, 2, 3, 4, 5]])}, "position_ids are not those"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5]])}, "position_ids are not those"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids has the shape \(1, 4\).*\(2, 5\)"),
        ({"position_ids": torch.arange(5)}, r"position_ids has the shape \(5,\)"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "attention_mask": torch.ones(2, 5)},
            "say what is packed by document_ids",
        ),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "use_cache": True}, "Packed documents are read at once"),
    ],
)
def test_other_positions_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(TwofoldError, match=says):
        drawn_model(LLAMA)(drawn_tokens(2, 5), **options)


def test_labels_may_be_shifted_already():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 7)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    wanted = model(tokens, labels=tokens).loss
    assert_near(model(tokens, labels=tokens, shift_labels=shifted).loss, wanted)
    assert_near(model(tokens, shift_labels=shifted).loss, wanted)
    half = model(tokens, shift_labels=shifted.masked_fill(torch.arange(7) > 3, -100), num_items_in_batch=12).loss
    assert_near(half, model(tokens[:, :5], labels=tokens[:, :5], num_items_in_batch=12).loss)


def test_labels_that_are_no_classes():
    for family in FAMILIES:
        inputs = drawn_inputs(FAMILIES[family])
        with pytest.raises(TwofoldError, match=r"labels are torch.float32, but classes are whole numbers"):
            drawn_model(FAMILIES[family])(**inputs | {"labels": inputs["labels"].float()})


# The model as an object


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_and_pickles(family: str):
    model, inputs = drawn_model(FAMILIES[family]), drawn_inputs(FAMILIES[family])
    wanted = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_near(again(**inputs).logits, wanted)
        assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_memory(family: str):
    model = drawn_model(FAMILIES[family])
    with torch.device("meta"):
        made = type(model)(model.config)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert {name: p.shape for name, p in made.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_layers_are_computed_again_only_while_asked():
    model = drawn_model(GPT2).train()
    inputs = drawn_inputs(GPT2)
    wanted = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    recompute_layers(model)
    assert all(layer.gradient_checkpointing for layer in model.trunk.layers)
    found = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other)
    disable = "activation_checkpointing_disable" if hasattr(model, "activation_checkpointing_disable") else None
    getattr(model, disable or "gradient_checkpointing_disable")()
    assert not any(layer.gradient_checkpointing for layer in model.trunk.layers)


def test_weights_of_other_shapes_are_refused_or_made_anew(tmp_path: Path):
    drawn_model(UNTIED).float().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        TwofoldForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    model = TwofoldForCausalLM.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    head = model.lm_head.weight
    assert head.shape == (50, 12)
    assert 0.5 * 0.02 < head.std() < 2 * 0.02  # as a new model's


# What generate can give besides tokens


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_scores_states_and_attention_weights(way: dict[str, Any], use_cache: bool):
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 5)
    options = {"max_new_tokens": 3, "use_cache": use_cache, "attention_mask": torch.ones_like(tokens)}
    asked = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    found = model.generate(tokens, return_dict_in_generate=True, **options, **asked, **{"do_sample": False} | way)
    rows = 2 * way.get("num_beams", 1)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == len(found.attentions) == 3
    for step, (states, attentions) in enumerate(zip(found.hidden_states, found.attentions, strict=True)):
        new = 5 + step if step == 0 or not use_cache else 1
        assert len(states) == 3
        assert {tuple(state.shape) for state in states} == {(rows, new, 12)}
        assert {tuple(weights.shape) for weights in attentions} == {(rows, 4, new, 5 + step)}


def test_a_model_says_how_likely_its_tokens_were():
    model, tokens = drawn_model(LLAMA), drawn_tokens(1, 5)
    found = model.generate(
        tokens,
        max_new_tokens=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        attention_mask=torch.ones_like(tokens),
    )
    scores = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    logits = model(found.sequences[:, :-1]).logits[:, 4:].log_softmax(dim=-1)
    wanted = logits.gather(2, found.sequences[:, 5:, None])[..., 0]
    torch.testing.assert_close(scores, wanted.float())  # generate keeps scores in float32


def test_the_configuration_says_how_long_a_text_may_be():
    """By the name under which other tools ask; it is no field, for the positions have it."""
    assert TwofoldConfig.from_spec(GPT2).max_position_embeddings == GPT2.positions.max_positions > 0
    assert TwofoldConfig.from_spec(LLAMA).max_position_embeddings is None
    assert "max_position_embeddings" not in TwofoldConfig.from_spec(GPT2).to_dict()
    with pytest.raises(TwofoldError, match=r"max_position_embeddings follows from the positions: say positions="):
        TwofoldConfig(max_position_embeddings=64)


def test_what_is_asked_of_every_model():
    for family in FAMILIES:
        model = drawn_model(FAMILIES[family])
        assert isinstance(model, TwofoldPreTrainedModel)
        assert model.main_input_name in ("input_ids", "pixel_values")
        assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
        assert model.can_generate() == (FAMILIES[family].architecture == "causal_lm")
        assert model._no_split_modules == {"Block"}
        assert {type(layer).__name__ for layer in model.trunk.layers} == {"Block"}
