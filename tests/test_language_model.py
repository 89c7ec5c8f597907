"""The language model: what it predicts, what is scored, and that padding and neighbours in a row change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attention_strategies import POSITIONS
from model_strategies import GPT2, LLAMA, VOCABULARY, decoders, drawn_model, drawn_tokens, recompute_layers
from twofold.errors import TwofoldError
from twofold.models import TwofoldForCausalLM
from twofold.positions import LearnedPositions, RotaryPositions
from twofold.spec import ModelSpec

FAMILIES = {"gpt2": GPT2, "llama": LLAMA}


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def gradients(model: TwofoldForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# It is the model that it says it is


def weights_of(model: torch.nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """A state of ours from one of theirs, by a table of parts of names."""
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    return state


def test_it_is_gpt2():
    spec = GPT2.with_changes(tie="(Q, K, V)", hidden_size=16, positions=LearnedPositions(length=23))
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=23, n_embd=16, n_layer=2, n_head=2, n_inner=19, activation_function="gelu",
        bos_token_id=None, eos_token_id=None, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    parts = {
        "transformer.wte": "embedding.tokens", "transformer.wpe": "embedding.positions", "transformer.ln_f": "trunk.norm",
        "transformer.h.": "trunk.layers.", "ln_1": "attention_norm", "ln_2": "mlp_norm", "attn.c_proj": "attention.o_proj",
        "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    state = weights_of(theirs, parts)
    for name in [name for name in state if name.startswith("trunk.layers") and state[name].ndim == 2]:
        state[name] = state[name].T
    for name in [name for name in state if "attn.c_attn" in name]:
        for role, part in zip("qkv", state.pop(name).chunk(3, dim=0), strict=True):
            state[name.replace("attn.c_attn", f"attention.{role}_proj")] = part
    ours = drawn_model(spec)
    ours.load_state_dict(state)
    tokens = drawn_tokens(3, 11)
    assert_near(ours(tokens, labels=tokens).logits, theirs(tokens).logits)
    assert ours(tokens, labels=tokens).loss.item() == pytest.approx(theirs(tokens, labels=tokens).loss.item(), rel=1e-6)


def test_it_is_llama():
    spec = LLAMA.with_changes(tie="(Q, K, V)", qk_norm=False, positions=RotaryPositions(), norm_eps=1e-6)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=19, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).double().eval()
    # The rotary tables of theirs are in single precision; weights of this size keep what follows from it small.
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {
        "model.embed_tokens": "embedding.tokens", "model.layers": "trunk.layers", "self_attn": "attention", "model.norm": "trunk.norm",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    ours = drawn_model(spec)
    ours.load_state_dict(weights_of(theirs, parts))
    tokens = drawn_tokens(3, 11)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-6, atol=1e-6)


# What is scored


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_of_the_next_token(name: str):
    model, tokens = drawn_model(FAMILIES[name]), drawn_tokens(3, 7)
    output = model(tokens, labels=tokens)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_near(output.loss, wanted)
    assert_near(model(tokens, labels=tokens, num_items_in_batch=5).loss * 5 / 18, wanted)
    assert_near(model(tokens, labels=tokens, num_items_in_batch=torch.tensor(36)).loss * 2, wanted)


def test_labels_of_minus_100_are_not_scored():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 7)
    labels = tokens.clone()
    labels[:, :5] = -100
    logits = model(tokens).logits
    wanted = F.cross_entropy(logits[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    assert_near(model(tokens, labels=labels).loss, wanted)


def test_nothing_to_score_is_no_loss():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 1)
    loss = model(tokens, labels=tokens).loss
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_never_scored(name: str):
    """Whatever its labels are, on either side."""
    model, tokens = drawn_model(FAMILIES[name]), drawn_tokens(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    loss = model(tokens, attention_mask=mask, labels=tokens).loss
    alone = [model(text, labels=text, num_items_in_batch=5 + 4).loss for text in (tokens[:1, 2:], tokens[1:, :5])]
    assert_near(loss, alone[0] + alone[1])


def test_a_loss_in_half_precision_is_computed_in_single():
    model, tokens = drawn_model(GPT2, std=0.1), drawn_tokens(2, 7)
    wanted, found = model(tokens, labels=tokens).loss, model.bfloat16()(tokens, labels=tokens).loss
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=0.02)


# Padding and packing


@given(decoders(), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=40)
def test_padding_on_either_side_changes_no_text(spec: ModelSpec, pads: int, length: int, seed: int):
    model, text = drawn_model(spec, seed), drawn_tokens(2, length, seed)
    padding, ones = drawn_tokens(2, pads, seed + 1), torch.ones_like(text)
    zeros = torch.zeros_like(padding)
    wanted = model(text).logits
    left = model(torch.cat((padding, text), dim=1), attention_mask=torch.cat((zeros, ones), dim=1)).logits
    right = model(torch.cat((text, padding), dim=1), attention_mask=torch.cat((ones, zeros), dim=1)).logits
    assert_near(left[:, pads:], wanted)
    assert_near(right[:, :length], wanted)


@given(decoders(), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=40)
def test_packed_documents_are_separate_documents(spec: ModelSpec, lengths: list[int], pads: int, seed: int):
    """Logits, loss and every gradient, with padding before the first document if there is any."""
    model, tokens = drawn_model(spec, seed), drawn_tokens(1, pads + sum(lengths), seed)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    documents = torch.cat((documents[:, :1].expand(1, pads), documents), dim=1)
    mask = (torch.arange(tokens.shape[1]) >= pads).long()[None] if pads else None
    scored = max(1, sum(lengths) - len(lengths))
    packed = model(
        tokens, document_ids=documents, attention_mask=mask, labels=tokens, num_items_in_batch=scored, use_cache=False
    )
    parts = tokens[:, pads:].split(lengths, dim=1)
    apart = [model(part, labels=part, num_items_in_batch=scored, use_cache=False) for part in parts]
    assert_near(packed.logits[:, pads:], torch.cat([output.logits for output in apart], dim=1))
    assert_near(packed.loss, sum(output.loss for output in apart))
    wanted = gradients(model, sum(output.loss for output in apart))
    for name, gradient in gradients(model, packed.loss).items():
        assert float((gradient - wanted[name]).abs().max()) <= 1e-9 * (1 + float(wanted[name].abs().max())), name


def test_documents_that_are_not_told_apart_see_one_another():
    """A liar for the test above."""
    model, tokens = drawn_model(LLAMA), drawn_tokens(1, 6)
    with pytest.raises(AssertionError):
        assert_near(model(tokens).logits[:, 3:], model(tokens[:, 3:]).logits)


# Training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_computed_again_have_the_same_gradients(name: str, dropout: float):
    model, tokens = drawn_model(FAMILIES[name].with_changes(dropout=dropout)).train(), drawn_tokens(2, 7)
    found = []
    for again in (False, True):
        if again:
            recompute_layers(model)
        torch.manual_seed(5)
        loss = model(tokens, labels=tokens).loss
        found.append({"loss": loss.detach(), **gradients(model, loss)})
    for gradient, recomputed in zip(found[0].values(), found[1].values(), strict=True):
        assert_near(recomputed, gradient)


def test_dropout_is_for_training():
    model, tokens = drawn_model(GPT2.with_changes(dropout=0.3)), drawn_tokens(2, 7)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    assert not any(isinstance(module, torch.nn.Dropout) for module in drawn_model(GPT2).modules())


# What may be asked of it


def test_logits_to_keep():
    model, tokens = drawn_model(LLAMA), drawn_tokens(2, 7)
    whole = model(tokens).logits
    assert_near(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    assert_near(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    assert model(tokens, labels=tokens, logits_to_keep=1).logits.shape == whole.shape


def test_embeddings_in_place_of_tokens():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 7)
    embedded = model.get_input_embeddings()(tokens)
    assert_near(model(inputs_embeds=embedded, labels=tokens).loss, model(tokens, labels=tokens).loss)


def test_hidden_states():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 7)
    output = model(tokens, output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 7, 12)] * 3
    assert_near(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(tokens).hidden_states is None


def test_a_tuple_instead_of_names():
    model, tokens = drawn_model(GPT2), drawn_tokens(2, 7)
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert_near(loss, model(tokens, labels=tokens).loss)
    assert logits.shape == (2, 7, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens(tied: bool):
    model, tokens = drawn_model(GPT2.with_changes(tie_word_embeddings=tied)), drawn_tokens(2, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert model.config.spec.vocab_size == VOCABULARY + 4
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.get_output_embeddings() is model.lm_head
    after = model(tokens + 4).logits
    assert after.shape[-1] == VOCABULARY + 4
    assert_near(model(tokens).logits[..., :VOCABULARY], before)
    model.resize_token_embeddings(5)
    assert model(tokens % 5).logits.shape[-1] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "inputs_embeds": torch.zeros(2, 3, 12)}, "exactly one"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids have the shape \(3,\)"),
        ({"input_ids": torch.full((2, 3), VOCABULARY)}, "input_ids hold 37.*vocabulary ends at 36"),
        ({"input_ids": torch.full((2, 3), -1)}, r"input_ids hold -1 \(least -1\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 5).double()}, r"inputs_embeds have the shape \(2, 3, 5\).*12"),
        ({"tokens": 2, "attention_mask": torch.ones(2, 4)}, r"attention_mask has the shape \(2, 4\).*\(2, 3\)"),
        ({"tokens": 2, "document_ids": torch.ones(2, 4)}, r"document_ids has the shape \(2, 4\).*\(2, 3\)"),
        ({"tokens": 2, "labels": torch.zeros(2, 4, dtype=torch.long)}, r"labels have the shape \(2, 4\).*\(2, 3\)"),
        ({"tokens": 2, "position_ids": torch.arange(1, 4)[None]}, "position_ids are not those"),
        ({"tokens": 2, "token_type_ids": torch.zeros(2, 3)}, "takes no argument 'token_type_ids'"),
        ({"tokens": 101}, "101 tokens is too long: this model has learned 100"),
    ],
)
def test_mistakes(options: dict[str, Any], says: str):
    options = dict(options)
    if count := options.pop("tokens", 0):
        options["input_ids"] = drawn_tokens(2, 3) if count == 2 else drawn_tokens(2, count)
    with pytest.raises(TwofoldError, match=says):
        drawn_model(GPT2)(**options)


def test_learned_positions_reach_as_far_as_they_are_long():
    model = drawn_model(GPT2.with_changes(positions=LearnedPositions(length=5)))
    padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    assert model(drawn_tokens(1, 8), attention_mask=padded).logits.shape == (1, 8, VOCABULARY)
    with pytest.raises(TwofoldError, match="6 tokens is too long"):
        model(drawn_tokens(1, 8), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]))


def assert_compiles(spec: ModelSpec, backend: str) -> None:
    """Into one graph, whose loss and gradients are the model's."""
    model, tokens = drawn_model(spec).train(), drawn_tokens(2, 7)
    loss = model(tokens, labels=tokens).loss
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(tokens, labels=tokens).loss
    assert_near(compiled, loss)
    wanted = gradients(model, loss)
    for name, gradient in gradients(model, compiled).items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize("positions", ["partial", "stream", "shared", "bias"])
def test_a_model_is_one_graph(positions: str):
    assert_compiles(LLAMA.with_changes(positions=POSITIONS[positions]), "eager")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("positions", ["learned", "rotary", "shared", "bias"])
def test_a_compiled_model_is_the_model(positions: str):
    assert_compiles(LLAMA.with_changes(positions=POSITIONS[positions]), "inductor")
