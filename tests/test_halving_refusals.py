"""What cannot be halved is refused in one sentence, and the model is then, bit for bit, what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.tensor
import transformers
from torch import nn

from halving_models import (
    ENCODER_DECODER,
    MULTI_HEAD,
    PER_LAYER_INPUTS,
    cache_of,
    gemma,
    gemma_config,
    going_on,
    randomized,
    tokens,
)
from twofold.errors import TwofoldError
from twofold.existing import halve, is_halved, restore
from twofold.existing.low_bits import quantized_cache

Before = tuple[dict[str, torch.Tensor], dict[str, set[str]]]


def state(model: nn.Module) -> Before:
    """All tensors, copied, and the names of everything that every module carries."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    return tensors, {name: set(vars(module)) for name, module in model.named_modules()}


def refused(model: nn.Module, part: str, **options: Any) -> str:
    tensors, attributes = state(model)
    with pytest.raises(TwofoldError, match=part) as caught:
        halve(model, **options)
    after, attributes_after = state(model)
    assert attributes == attributes_after
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def llama(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))))


def test_an_unknown_architecture():
    assert "Gemma4Text" in refused(nn.Linear(3, 3).eval(), "no attention that is known here")


def test_grouped_heads_are_told_the_theorem():
    sentence = refused(llama(num_key_value_heads=2), "4 query heads share 2 KV heads")
    assert "only retraining" in sentence


def test_a_model_that_is_halved_already():
    model = gemma()
    halve(model)
    refused(model, "halved already")
    restore(model)
    halve(model)


def test_a_model_in_training():
    refused(gemma().train(), "in training")


def test_weights_that_are_not_there():
    with torch.device("meta"):
        model = transformers.Gemma4ForCausalLM(gemma_config()).eval()
    refused(model, "meta device")


def test_a_singular_projection():
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[0] = layer.self_attn.k_proj.weight[1]
    refused(model, "has no inverse")


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_projections_that_are_not_square(name: str):
    """As flan-t5-small and mt5-small have them: fewer floats, or more, than the input of a layer."""
    for width in (4, 16):
        sentence = refused(randomized(ENCODER_DECODER[name](d_kv=width)), "only as many floats of as many")
        assert f"make {4 * width} floats of 32" in sentence


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"keep": "everything"}, "keep is 'everything', but must be one of auto, keys, values"),
        ({"max_error": float("nan")}, "max_error is nan"),
        ({"max_error": -0.1}, "max_error is -0.1"),
    ],
)
@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_options_that_there_are_not(name: str, options: dict[str, Any], part: str):
    refused(gemma() if name == "gemma" else randomized(MULTI_HEAD[name]()), part, **options)


def test_what_is_no_model():
    with pytest.raises(TwofoldError, match=r"takes a model, and was given a str.*\.$"):
        halve("openai-community/gpt2")


@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"])
def test_numbers_that_are_not_finite(part: str):
    model = randomized(MULTI_HEAD["llama"]())
    for layer in model.model.layers:
        layer.self_attn.get_parameter(part).data.view(-1)[3] = torch.inf
    refused(model, f"projection of {'keys' if part[0] == 'k' else 'values'} holds numbers that are not finite")


def test_a_map_that_has_no_room_in_its_dtype():
    """W_K⁻¹ W_V has numbers beyond the greatest of float16."""
    model = llama().half()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.mul_(1e-4)
        layer.self_attn.v_proj.weight.data.mul_(1e3)
    refused(model, r"more than max_error = 9 of its size \(the least of these errors is inf\)", max_error=9.0)


def test_values_that_are_zero_follow_from_any_keys():
    model, text = llama(), tokens(1, 20)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
    before = model.generate(text, max_new_tokens=5, do_sample=False)
    assert [layer.measured_error for layer in halve(model).layers] == [0.0, 0.0]
    assert torch.equal(model.generate(text, max_new_tokens=5, do_sample=False), before)


def test_layers_that_would_lose_too_much_are_left_and_the_others_halved():
    model = llama().bfloat16()
    report = halve(model, max_error=1.0)
    worse = max(layer.measured_error for layer in report.layers)
    restore(model)
    report = halve(model, max_error=worse * 0.999)
    kept = {layer.measured_error: layer.kept for layer in report.layers}
    assert kept[worse] == "both"
    assert sorted(kept.values()) == ["both", "keys"]
    reason = next(layer.reason for layer in report.layers if layer.reason)
    assert "max_error" in reason
    restore(model)
    best = min(layer.measured_error for layer in report.layers)
    assert f"the least of these errors is {best:.2g}" in refused(model, "max_error", max_error=0.0)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("phi", {"qk_layernorm": True}, "qk_layernorm is set"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv is set"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "frequencies change",
        ),
    ],
)
def test_keys_that_are_no_linear_map(name: str, changes: dict[str, Any], part: str):
    model: Any = MULTI_HEAD[name]()
    refused(randomized(type(model)(type(model.config)(**(model.config.to_dict() | changes)))), part)


def test_keys_that_turn_are_made_from_no_values():
    refused(llama(), "keep keys", keep="values")


@pytest.mark.parametrize("name", ["gemma", "gpt2", "gpt_neox", "llama"])
def test_parts_that_no_layer_of_the_class_has(name: str):
    """As code of a model's own may have, under a name that is known here."""
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name]())
    for layer in model.modules():
        if type(layer).__name__.endswith("Attention"):
            layer.key_norm = nn.LayerNorm(8)
    refused(model, "it has a key_norm, which is not known here")


@pytest.mark.parametrize("what", ["eps", "scale", "projection"])
def test_a_model_that_only_looks_like_gemma(what: str):
    model = gemma()
    for layer in model.model.layers:
        attention = layer.self_attn
        if what == "eps":
            attention.v_norm.eps = 1e-3
        elif what == "scale":
            attention.v_norm.with_scale = True
        elif attention.v_proj is None:
            attention.v_proj = nn.Linear(32, 32, bias=False).double()
    refused(model, {"eps": "different lengths", "scale": "without its scale", "projection": "apart"}[what])


def test_adapters_that_are_not_merged():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["k_proj"], r=2)).eval()
    refused(adapted, "adapters")
    merged = adapted.merge_and_unload().eval()
    halve(merged)


@pytest.mark.filterwarnings("ignore")  # of the names of a cache, and of positions that are made anew
def test_prefixes_that_are_a_cache():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    refused(tuned, "tuned prefixes")
    halve(tuned.get_base_model())
    with pytest.raises(TwofoldError, match="keys and values apart"):
        tuned(tokens(1, 4))


@pytest.mark.filterwarnings("ignore")
def test_prompts_that_were_tuned_are_words_like_others():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    tuned = tuned.double()
    before = tuned.generate(input_ids=tokens(1, 4), max_new_tokens=6, do_sample=False)
    halve(tuned)
    assert torch.equal(tuned.generate(input_ids=tokens(1, 4), max_new_tokens=6, do_sample=False), before)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "bart"])
def test_a_cache_from_before(name: str):
    made = {"gemma": gemma} | {
        key: lambda key=key: randomized((MULTI_HEAD | ENCODER_DECODER)[key]()) for key in ("gpt2", "bart")
    }
    model = made[name]()
    asked = (
        {"decoder_input_ids": tokens(1, 5), "input_ids": tokens(1, 9)}
        if name == "bart"
        else {"input_ids": tokens(1, 9)}
    )
    cache = cache_of(model(**asked, use_cache=True))
    halve(model)
    with pytest.raises(TwofoldError, match="keys and values apart"):
        model(**asked, **going_on(model, cache))
    if name == "bart":
        cache.self_attention_cache = type(cache.self_attention_cache)()
        with pytest.raises(TwofoldError, match="keys and values apart"):
            model(**asked, **going_on(model, cache))


def test_weights_that_are_no_numbers():
    model = llama()

    class Packed(nn.Linear):
        """What a quantizer puts in a projection's place."""

    for layer in model.model.layers:
        layer.self_attn.k_proj.__class__ = Packed
    refused(model, "held as Packed, of which there is no inverse.*dequantize")


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_tensors_that_only_look_like_numbers(part: str):
    """What torchao leaves in an nn.Linear: a tensor that says bfloat16 and holds codes. Queries and outputs may be so, for they are only called."""

    class Codes(torch.Tensor):
        """Of some quantizer."""

    model = llama()
    for layer in model.model.layers:
        projection = getattr(layer.self_attn, part)
        projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Codes), requires_grad=False)
    if part in ("k_proj", "v_proj"):
        refused(model, "held as Codes, of which there is no inverse.*dequantize")
    else:
        assert halve(model).num_halved == 2


@pytest.mark.parametrize("quantizer", ["torchao", "bitsandbytes"])
@pytest.mark.filterwarnings("ignore")
def test_quantizers_that_are_installed(quantizer: str):
    module = pytest.importorskip(quantizer)
    model, expected = llama().bfloat16(), gemma().bfloat16()
    for one in (model, expected):
        if quantizer == "torchao":
            module.quantization.quantize_(one, module.quantization.Int8WeightOnlyConfig())
            continue
        for parent in list(one.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear and name != "lm_head":
                    packed = module.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None)
                    packed.weight = module.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, packed.to("cpu"))
    with pytest.raises(TwofoldError, match=r"of which there is no inverse.*dequantize"):
        halve(model)
    assert not any(is_halved(part) for part in model.modules())
    text = tokens(1, 20)
    before = expected.generate(text, max_new_tokens=9, do_sample=False)
    halve(expected)  # whose keys and values are one output, of whatever made it
    assert torch.equal(expected.generate(text, max_new_tokens=9, do_sample=False), before)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_one_layer_in_two_types(name: str):
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name]())
    model = model.bfloat16()
    other = {"gemma": "o_proj", "gpt2": "c_proj", "llama": "v_proj"}[name]
    attention = [module for module in model.modules() if type(module).__name__.endswith("Attention")][-1]
    getattr(attention, other).float()
    sentence = refused(model, "numbers of several types")
    assert f"{other} float32" in sentence
    assert "model.to" in sentence


def test_a_model_split_over_devices():
    """As tensor parallelism and FSDP leave parameters; here the devices are one process."""
    model = gemma()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        projection = model.model.layers[2].self_attn.k_proj
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        shard = [torch.distributed.tensor.Shard(0)]
        projection.weight = nn.Parameter(
            torch.distributed.tensor.distribute_tensor(projection.weight.data, mesh, shard)
        )
        refused(model, "layers.2.self_attn.k_proj.weight.*split over devices")
    finally:
        torch.distributed.destroy_process_group()


def test_an_encoder_has_no_cache():
    refused(transformers.T5EncoderModel(ENCODER_DECODER["t5"]().config).eval(), "no cache of their own")


def test_deepseek_is_told_that_it_has_one_tensor_already():
    class DeepseekV4Attention(nn.Module):
        """By its name."""

    refused(nn.Sequential(DeepseekV4Attention()).eval(), "already caches one tensor")


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_masks_that_are_not_understood(name: str):
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name]())
    model.config._attn_implementation = "flex_attention"
    refused(model, "flex_attention.*set_attn_implementation with 'eager'")


def test_masks_that_are_no_longer_understood():
    model = gemma()
    halve(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(TwofoldError, match="does not understand the masks"):
        model.model.layers[2].self_attn(
            torch.zeros(1, 2, 32, dtype=torch.float64),
            position_embeddings=(torch.ones(1, 2, 32).double(), torch.zeros(1, 2, 32).double()),
            attention_mask=None,
        )


def test_a_quantized_cache_is_for_a_halved_model():
    with pytest.raises(TwofoldError, match="not halved"):
        quantized_cache(gemma())


def test_restoring_what_is_not_halved_changes_nothing():
    model = gemma(**PER_LAYER_INPUTS)
    before = state(model)
    restore(model)
    assert state(model)[1] == before[1]
    assert not any(is_halved(module) for module in model.modules())
