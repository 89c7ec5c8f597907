"""What all models share: parameters that the cost floor counts, first weights that pair seeds, gradients for every weight; lists, sets and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from attention_strategies import NAMED_TIES, POSITIONS
from model_strategies import FAMILIES, GPT2, IMAGE, LLAMA, SET, drawn_inputs, drawn_model
from test_cost import models
from test_presets import PUBLISHED_300M
from twofold.cost import parameters, training_flops_per_token
from twofold.errors import TwofoldError
from twofold.models import TwofoldConfig, TwofoldForCausalLM, TwofoldPreTrainedModel, build_model
from twofold.models.loss import mean_cross_entropy
from twofold.positions import LearnedPositions
from twofold.presets import PRESETS
from twofold.spec import ModelSpec


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def possible(spec: ModelSpec) -> ModelSpec:
    """An image's class token stands first and must see what follows."""
    return spec.with_changes(causal=False) if spec.architecture == "image_classification" else spec


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# Counts


@given(models())
@settings(max_examples=60)
def test_parameters_are_counted_as_they_are(spec: ModelSpec):
    with torch.device("meta"):
        model = build_model(possible(spec), seed=0)
    assert counted(model) == parameters(spec)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tie", PUBLISHED_300M)
def test_the_papers_model_has_the_papers_parameters(tie: str):
    spec = PRESETS["paper-300m"].with_changes(tie=tie)
    with torch.device("meta"):
        model = build_model(spec, seed=0)
    assert round(counted(model) / 1e6, 1) == PUBLISHED_300M[tie]


@pytest.mark.parametrize("name", ["paper-1.2b", "small", "tiny"])
def test_presets_are_counted_as_they_are(name: str):
    with torch.device("meta"):
        model = build_model(PRESETS[name], seed=0)
    assert counted(model) == parameters(PRESETS[name])


@given(models())
@settings(max_examples=25)
def test_operations_are_those_that_torch_counts(spec: ModelSpec):
    """Forward, where every token sees all keys: the readable backend computes the products that a mask throws away."""
    causal = spec.architecture == "causal_lm"
    seen = possible(spec).with_changes(window_tokens=(0,), dropout=0.0)
    model, inputs = drawn_model(seen, backend="reference"), drawn_inputs(seen)
    context = 10 if seen.architecture == "image_classification" else 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, **({"use_cache": False} if causal else {}))
    thrown_away = 0
    if seen.causal:
        layer = seen.attention(0)
        products = 2 * layer.num_attention_heads * (2 * layer.head_dim + layer.positions.key_extension_dim)
        thrown_away = seen.num_hidden_layers * products * (context - (context + 1) / 2)
    wanted = training_flops_per_token(seen, context) / 3 + thrown_away
    assert counter.get_total_flops() / (3 * context) == pytest.approx(wanted)


def test_a_training_step_is_three_forwards():
    model, inputs = drawn_model(LLAMA, backend="reference"), drawn_inputs(LLAMA)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**inputs)
    with FlopCounterMode(display=False) as whole:
        model(**inputs).loss.backward()
    assert whole.get_total_flops() == 3 * forward.get_total_flops()


# First weights


def shared(a: nn.Module, b: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    return {
        name: (first[name], second[name])
        for name in first.keys() & second.keys()
        if first[name].shape == second[name].shape
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_pair_what_two_ties_share(name: str):
    spec = FAMILIES[name].with_changes(num_key_value_heads=FAMILIES[name].num_attention_heads)
    whole = build_model(spec.with_changes(tie="(Q, K, V)"), seed=3)
    for tie in ("(Q, K=V)", "(Q=K, V)", "(Q=K=V)", "V = Q - K"):
        other = build_model(spec.with_changes(tie=tie), seed=3)
        pairs = shared(whole, other)
        assert all(torch.equal(a, b) for a, b in pairs.values())
        assert len(pairs) == len(list(other.parameters()))
        assert {"trunk.layers.1.attention.q_proj.weight", "trunk.layers.0.mlp.up_proj.weight"} <= pairs.keys()


def test_other_seeds_draw_other_weights():
    for name, (a, b) in shared(build_model(LLAMA, seed=3), build_model(LLAMA, seed=4)).items():
        assert torch.equal(a, b) == ("norm" in name), name


def test_layers_are_drawn_apart():
    drawn = [p for p in build_model(GPT2, seed=3).parameters() if p.ndim > 1]
    firsts = {round(parameter.flatten()[0].item(), 6) for parameter in drawn}
    assert len(firsts) == len(drawn)


def test_first_weights_depend_on_the_seed_and_nothing_else():
    """Not on torch's random state, which is left for the caller to say; nor on the dtype."""
    torch.manual_seed(1)
    first = build_model(GPT2, seed=3)
    torch.manual_seed(2)
    second = build_model(GPT2, seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        wide = build_model(GPT2, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    narrow = TwofoldForCausalLM._from_config(TwofoldConfig.from_spec(GPT2), initial_seed=3, dtype=torch.bfloat16)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.bfloat16)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert torch.equal(parameter.double(), wide.get_parameter(name))
        assert torch.equal(parameter.bfloat16(), narrow.get_parameter(name))


def test_without_a_seed_torch_decides():
    config, made = TwofoldConfig.from_spec(GPT2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(TwofoldForCausalLM(config).lm_head.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_each_weight_starts_from():
    wide = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.05, "qk_norm": True}
    for spec in (GPT2, SET, IMAGE, LLAMA.with_changes(positions=POSITIONS["bias"])):
        for name, parameter in build_model(spec.with_changes(**wide), seed=0).named_parameters():
            if "norm" in name:
                assert bool((parameter == float(name.endswith("weight"))).all()), name
            elif name.endswith("bias") and "relative" not in name:
                assert not parameter.any(), name
            else:
                # Five standard errors of a standard deviation.
                error = 5 / (2 * parameter.numel()) ** 0.5
                assert parameter.std().item() == pytest.approx(0.05, rel=error), name


def test_weights_of_2d_positions_start_as_no_temperature():
    model = build_model(SET.with_changes(tie="(Q=K, V)+", plus_channels=6), seed=0)
    attention = model.trunk.layers[0].attention
    assert attention.plus_weight.sum().item() == pytest.approx(1)
    assert torch.equal(attention.plus_bias, torch.zeros(1))


# Gradients


def assert_every_weight_learns(model: TwofoldPreTrainedModel, inputs: dict[str, Tensor]) -> None:
    model.train()(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # What is added to every logit of a row alike changes no softmax.
        if name.endswith("weight") or "relative_bias" in name or "class_token" in name:
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("tie", [*map(str, NAMED_TIES), "(Q=K, V)+"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_learns(name: str, tie: str):
    spec = FAMILIES[name]
    if "+" in tie and spec.causal:
        return
    spec = spec.with_changes(tie=tie, num_key_value_heads=spec.num_attention_heads)
    assert_every_weight_learns(drawn_model(spec), drawn_inputs(spec))


@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_every_position_scheme_learns(positions: str):
    spec = GPT2.with_changes(positions=POSITIONS[positions], tie="(Q, K=V)", qk_norm=True, num_key_value_heads=1)
    assert_every_weight_learns(drawn_model(spec), drawn_inputs(spec))


@given(models())
@settings(max_examples=25)
def test_every_model_computes_its_loss(spec: ModelSpec):
    spec = possible(spec)
    model, inputs = drawn_model(spec, std=0.3), drawn_inputs(spec)
    output = model(**inputs)
    assert output.loss.isfinite()
    assert output.logits.shape[-1] == (spec.num_labels or spec.vocab_size)


# The loss


def test_the_loss_by_hand():
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, 2, -100], [0, -100, 4]])
    wanted = -sum(F.log_softmax(logits[i, j], dim=0)[labels[i, j]] for i, j in ((0, 0), (0, 1), (1, 0), (1, 2)))
    assert_near(mean_cross_entropy(logits, labels), wanted / 4)
    assert_near(mean_cross_entropy(logits, labels, 10), wanted / 10)
    assert mean_cross_entropy(logits, torch.full_like(labels, -100)) == 0
    assert mean_cross_entropy(logits.half(), labels).dtype == torch.float32
    with pytest.raises(TwofoldError, match=r"labels have the shape \(3, 2\), but must be \(2, 3\)"):
        mean_cross_entropy(logits, labels.T)


# Lists and sets


@pytest.mark.parametrize("tie", ["(Q, K, V)", "(Q=K=V)", "(Q, K=V)"])
def test_a_set_has_no_order(tie: str):
    model, inputs = drawn_model(SET.with_changes(tie=tie)), drawn_inputs(SET)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    logits = model(features=inputs["features"]).logits
    assert_near(model(features=inputs["features"][:, order]).logits, logits[:, order])


@pytest.mark.parametrize("changes", [{"positions": POSITIONS["learned"]}, {"tie": "(Q, K=V)+"}, {"causal": True}])
def test_a_list_has_an_order(changes: dict[str, Any]):
    model, inputs = drawn_model(SET.with_changes(**changes)), drawn_inputs(SET)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    logits = model(features=inputs["features"]).logits
    assert (model(features=inputs["features"][:, order]).logits - logits[:, order]).abs().max().item() > 1e-3


@pytest.mark.parametrize("spec", [SET, SET.with_changes(vocab_size=11, feature_size=0)], ids=["features", "tokens"])
def test_padded_elements_are_not_there(spec: ModelSpec):
    model, inputs = drawn_model(spec), drawn_inputs(spec)
    name = "features" if spec.feature_size else "input_ids"
    labels = inputs["labels"]
    mask = (torch.arange(7) < 4).expand(3, 7)
    found = model(**{name: inputs[name]}, attention_mask=mask, labels=labels)
    short = model(**{name: inputs[name][:, :4]}, labels=labels[:, :4])
    assert_near(found.logits[:, :4], short.logits)
    assert_near(found.loss, short.loss)
    with pytest.raises(TwofoldError, match="attention_mask has the shape"):
        model(**{name: inputs[name]}, attention_mask=mask[:, :5])


def test_mistakes_of_a_set():
    model, inputs = drawn_model(SET), drawn_inputs(SET)
    for given_inputs in ({}, {"input_ids": inputs["labels"], "features": inputs["features"]}):
        with pytest.raises(TwofoldError, match="exactly one of input_ids and features"):
            model(**given_inputs)
    with pytest.raises(TwofoldError, match="reads features and not tokens"):
        model(input_ids=inputs["labels"])
    with pytest.raises(TwofoldError, match=r"features have the shape \(3, 7, 4\).*\(batch, items, 5\)"):
        model(features=inputs["features"][..., :4])
    with pytest.raises(TwofoldError, match="reads tokens and not features"):
        drawn_model(SET.with_changes(vocab_size=3, feature_size=0))(features=inputs["features"])
    with pytest.raises(TwofoldError, match="takes no argument 'use_cache'"):
        model(features=inputs["features"], use_cache=True)
    with pytest.raises(TwofoldError, match="is a causal_lm, but the configuration says token_classification"):
        TwofoldForCausalLM(TwofoldConfig.from_spec(SET))


def test_inputs_are_known_to_transformers():
    assert drawn_model(SET).get_input_embeddings().in_features == 5
    assert drawn_model(SET.with_changes(vocab_size=3, feature_size=0)).get_input_embeddings().num_embeddings == 3
    assert isinstance(drawn_model(IMAGE).get_input_embeddings(), nn.Conv2d)


# Images


def test_patches_are_read_behind_a_class_token():
    """The patches of 5 x 5 pixels in reading order, each a linear map of its pixels; the logits are those of the first token's state."""
    model, images = drawn_model(IMAGE), drawn_inputs(IMAGE)["pixel_values"]
    output = model(images, output_hidden_states=True)
    assert output.logits.shape == (3, 7)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 1 + 9, 12)] * 3
    assert_near(model.classifier(output.hidden_states[-1][:, 0]), output.logits)
    embedded, kernel = model.patches(images), model.patches.patches
    wanted = torch.einsum("ochw,bchw->bo", kernel.weight, images[:, :, 5:10, 10:15]) + kernel.bias
    assert_near(embedded[:, 1 + 5], wanted)
    assert_near(embedded[:, 0], model.patches.class_token[0].expand(3, 12))


def test_an_image_without_positions_is_a_set_of_patches():
    images = drawn_inputs(IMAGE)["pixel_values"]
    turned = torch.roll(images, 5, dims=3)
    unplaced = drawn_model(IMAGE.with_changes(positions=POSITIONS["none"]))
    assert_near(unplaced(turned).logits, unplaced(images).logits)
    placed = drawn_model(IMAGE)
    assert (placed(turned).logits - placed(images).logits).abs().max().item() > 1e-3


def test_mistakes_of_an_image():
    model, inputs = drawn_model(IMAGE), drawn_inputs(IMAGE)
    with pytest.raises(TwofoldError, match=r"pixel_values have the shape \(3, 3, 10, 15\).*\(batch, 3, 15, 15\)"):
        model(inputs["pixel_values"][:, :, :10])
    with pytest.raises(TwofoldError, match=r"labels have the shape \(2,\), but must be \(3,\)"):
        model(inputs["pixel_values"], labels=inputs["labels"][:2])
    with pytest.raises(TwofoldError, match=r"10 tokens .* but there are 9 learned positions"):
        build_model(IMAGE.with_changes(positions=LearnedPositions(length=9)), seed=0)
    with pytest.raises(TwofoldError, match="set causal=False"):
        build_model(IMAGE.with_changes(causal=True), seed=0)


def test_one_attention_is_in_all_of_them():
    names = {type(build_model(spec, seed=0).trunk.layers[0].attention) for spec in FAMILIES.values()}
    assert [kind.__name__ for kind in names] == ["Attention"]
