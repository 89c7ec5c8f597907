"""``attn_implementation``: other models through our kernels, and our models under Transformers' names for kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from model_strategies import FAMILIES, GPT2, LLAMA, drawn_inputs, drawn_model, drawn_tokens
from twofold.errors import TwofoldError
from twofold.kernels import BACKENDS, Inputs
from twofold.models import TwofoldConfig, TwofoldForCausalLM, attention_interface
from twofold.models.attention_interface import BACKENDS_BY_IMPLEMENTATION, NAME

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 19,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 6}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "mistral with a window": ("mistral", GROUPED | {"sliding_window": 3}),
    "gpt2": ("gpt2", SIZES | {"n_inner": 19, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}),
    "gemma": ("gemma", GROUPED | {"head_dim": 8}),
    "gemma3, one layer in two with a window": (
        "gemma3_text",
        GROUPED | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("qwen3", GROUPED),
    "gpt_neox": ("gpt_neox", SIZES),
    "opt": ("opt", SIZES | {"ffn_dim": 19, "word_embed_proj_dim": 24, "dropout": 0.0}),
    "deepseek_v3, keys longer than values": (
        "deepseek_v3",
        SIZES | {
            "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
            "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
        },
    ),
}  # fmt: skip

BART: dict[str, Any] = {
    "vocab_size": 37, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 19, "decoder_ffn_dim": 19, "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def drawn(kind: type, model_type: str, sizes: dict[str, Any]) -> dict[str, PreTrainedModel]:
    """One model of Transformers' twice, with weights large enough for attention to matter: eager (whose softmax is float32) and ours."""
    config = AutoConfig.for_model(model_type, **sizes)
    eager = kind.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            values = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + values if "norm" in name and name.endswith("weight") else values)
    ours = kind.from_config(AutoConfig.for_model(model_type, **sizes), attn_implementation=NAME).eval()
    ours.load_state_dict(eager.state_dict())
    return {"eager": eager, NAME: ours}


def decoder(name: str) -> dict[str, PreTrainedModel]:
    return drawn(AutoModelForCausalLM, *DECODERS[name])


@contextmanager
def counted_calls() -> Iterator[list[Inputs]]:
    """What reaches our kernels within the block."""
    calls: list[Inputs] = []
    served = attention_interface.attend

    def attend(inputs: Inputs) -> Tensor:
        calls.append(inputs)
        return served(inputs)

    attention_interface.attend = attend
    try:
        yield calls
    finally:
        attention_interface.attend = served


def padded(side: str, length: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens of three texts of 7, 5 and 2 tokens, and their mask."""
    missing = torch.tensor([[0], [2], [5]])
    mask = torch.arange(length) >= missing
    return drawn_tokens(3, length), (mask if side == "left" else mask.flip(1)).long()


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


# Other models through our kernels


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_transformers_computes_the_same_through_our_kernels(name: str):
    models = decoder(name)
    tokens = drawn_tokens(3, 7)
    with counted_calls() as calls:
        found = models[NAME](tokens, labels=tokens)
    wanted = models["eager"](tokens, labels=tokens)
    assert len(calls) == 2
    assert_near(found.logits, wanted.logits)
    found.loss.backward()
    wanted.loss.backward()
    for (parameter, gradient), (_, other) in zip(*(model.named_parameters() for model in models.values()), strict=True):
        if gradient.grad is not None:
            torch.testing.assert_close(other.grad, gradient.grad, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_padding_is_seen_by_nobody(name: str, side: str):
    models = decoder(name)
    tokens, mask = padded(side)
    found, wanted = (models[key](tokens, attention_mask=mask).logits for key in (NAME, "eager"))
    assert_near(found[mask.bool()], wanted[mask.bool()])
    assert found.isfinite().all()
    changed = torch.where(mask.bool(), tokens, (tokens + 1) % 37)
    assert_near(models[NAME](changed, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_through_our_kernels(name: str, cache: str | None):
    models = decoder(name)
    tokens, mask = padded("left")
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    found, wanted = (
        models[key].generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)
        for key in (NAME, "eager")
    )
    assert torch.equal(found, wanted)
    assert len(set(found[:, 7:].flatten().tolist())) > 1


@torch.no_grad()
def test_packed_documents_and_masks_of_ones_own():
    models = decoder("llama")
    tokens = drawn_tokens(2, 7)
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1]])
    found, wanted = (models[key](tokens, position_ids=places, use_cache=False).logits for key in (NAME, "eager"))
    assert_near(found, wanted)
    alone = models["eager"](tokens[:1, 3:5]).logits
    assert_near(found[:1, 3:5], alone)
    allowed = torch.ones(2, 1, 7, 7).tril().bool() & (torch.rand(2, 1, 7, 7) > 0.3) | torch.eye(7, dtype=torch.bool)
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    wanted = models["eager"](tokens, attention_mask=added).logits
    for mask in (allowed, added):
        assert_near(models[NAME](tokens, attention_mask=mask).logits, wanted)


@torch.no_grad()
def test_encoders_and_cross_attention():
    bert = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
    models = drawn(AutoModel, "bert", bert | {"pad_token_id": 0})
    tokens, mask = padded("right")
    found, wanted = (models[key](tokens, attention_mask=mask).last_hidden_state for key in (NAME, "eager"))
    assert_near(found[mask.bool()], wanted[mask.bool()])

    sizes = {
        "vocab_size": 37,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 19,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    models = drawn(
        AutoModelForSeq2SeqLM, "t5", sizes | {"decoder_start_token_id": 0}
    )  # adds its positions to the logits
    found, wanted = (
        models[key](tokens, attention_mask=mask, decoder_input_ids=tokens[:, :4]).logits for key in (NAME, "eager")
    )
    assert_near(found, wanted)

    models = drawn(AutoModelForSeq2SeqLM, "bart", BART)
    for text in (tokens[:, :2], tokens):  # one that is longer than its source, too
        found, wanted = (models[key](tokens[:, :3], decoder_input_ids=text).logits for key in (NAME, "eager"))
        assert_near(found, wanted)


@torch.no_grad()
def test_what_one_word_says_is_not_spelt_out():
    """Plain causal attention and decoding reach the kernels as such, where they are fastest, and padding as a mask of keys."""
    model = decoder("llama")[NAME]
    tokens, mask = padded("left")

    def kinds(attention_mask: Tensor) -> set[tuple[int, bool, bool, bool]]:
        with counted_calls() as calls:
            model.generate(tokens, attention_mask=attention_mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return {
            (call.query.shape[2], call.mask.causal, call.mask.key_mask is not None, call.bias is not None)
            for call in calls
        }

    assert kinds(torch.ones_like(mask)) == {(7, True, False, False), (1, False, False, False)}
    assert kinds(mask) == {(7, False, False, True), (1, False, True, False)}


@torch.no_grad()
def test_without_its_mask_function_an_implementation_sees_padding():
    """Why both registries are filled: the liar of the tests above."""
    models = decoder("llama")
    tokens, mask = padded("left")
    kept = AttentionMaskInterface._global_mapping.pop(NAME)
    try:
        blind = models[NAME](tokens, attention_mask=mask).logits
    finally:
        AttentionMaskInterface.register(NAME, kept)
    seeing = models[NAME](tokens, attention_mask=mask).logits
    assert (blind - seeing)[mask.bool()].abs().max() > 0.1


def test_what_no_kernel_computes_is_refused():
    tokens = drawn_tokens(1, 5)
    gemma2 = drawn(AutoModelForCausalLM, "gemma2", GROUPED | {"head_dim": 8})[NAME]
    with pytest.raises(TwofoldError, match=r"Gemma2Attention asks for attention with 'softcap'.*eager"):
        gemma2(tokens)
    model_type, sizes = DECODERS["gpt2"]
    dropping = drawn(AutoModelForCausalLM, model_type, sizes | {"attn_pdrop": 0.25})[NAME]
    dropping(tokens)
    with pytest.raises(TwofoldError, match=r"GPT2Attention asks for attention with dropout of 0.25.*eager"):
        dropping.train()(tokens)
    llama = decoder("llama")[NAME]
    for option in ({"output_attentions": True}, {"cu_seq_lens_q": torch.tensor([0, 5])}, {"indices": tokens}):
        with pytest.raises(TwofoldError, match=f"attention with '{next(iter(option))}'"):
            llama(tokens, **option)


def test_an_implementation_is_changed_in_place():
    model = decoder("llama")["eager"]
    tokens = drawn_tokens(2, 7)
    wanted = model(tokens).logits
    model.set_attn_implementation(NAME)
    with counted_calls() as calls:
        assert_near(model(tokens).logits, wanted)
    assert calls


# Our models under Transformers' names


WAYS: dict[str, Callable[..., TwofoldForCausalLM]] = {
    "from_pretrained": lambda folder, name: TwofoldForCausalLM.from_pretrained(folder, attn_implementation=name),
    "Auto": lambda folder, name: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name),
    "from_config": lambda folder, name: AutoModelForCausalLM.from_config(
        TwofoldConfig.from_pretrained(folder), attn_implementation=name
    ),
    "config": lambda folder, name: TwofoldForCausalLM(TwofoldConfig.from_pretrained(folder, attn_implementation=name)),
    "set": lambda folder, name: _set(TwofoldForCausalLM.from_pretrained(folder), name),
}


def _set(model: TwofoldForCausalLM, name: str) -> TwofoldForCausalLM:
    model.set_attn_implementation(name)
    return model


def backends(model: torch.nn.Module) -> set[str]:
    return {layer.attention.backend for layer in model.trunk.layers} | {model.backend}


@pytest.mark.parametrize("way", WAYS)
def test_our_models_take_an_implementation_in_every_way(way: str, tmp_path: Path):
    drawn_model(GPT2).save_pretrained(tmp_path)
    assert backends(TwofoldForCausalLM.from_pretrained(tmp_path)) == {"auto"}
    for name, backend in BACKENDS_BY_IMPLEMENTATION.items():
        model = WAYS[way](tmp_path, name)
        assert backends(model) == {backend}
        assert model.config._attn_implementation == name
    for wrong in ("flash_attention_2", "flex_attention", "warp"):
        with pytest.raises(
            TwofoldError, match=f'"{wrong}"` is not supported by Twofold models: use one of twofold, eager, sdpa'
        ):
            WAYS[way](tmp_path, wrong)


def test_every_implementation_is_a_kernel():
    assert set(BACKENDS_BY_IMPLEMENTATION.values()) <= {*BACKENDS, "auto"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_our_models_compute_the_same_under_every_name(family: str):
    model = drawn_model(FAMILIES[family])
    inputs = drawn_inputs(FAMILIES[family])
    wanted = model(**inputs).logits
    for name in BACKENDS_BY_IMPLEMENTATION:
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-9, atol=1e-9)


def test_a_refused_name_changes_nothing():
    model = drawn_model(LLAMA, backend="reference")
    with pytest.raises(TwofoldError, match="is not supported by Twofold models"):
        model.set_attn_implementation("flash_attention_2")
    assert backends(model) == {"reference"}
    assert model.config._attn_implementation == NAME


def test_an_implementation_is_of_the_process_and_not_of_the_checkpoint(tmp_path: Path):
    model = TwofoldForCausalLM(TwofoldConfig.from_spec(GPT2, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    assert "implementation" not in (tmp_path / "config.json").read_text()
    assert backends(TwofoldForCausalLM.from_pretrained(tmp_path)) == {"auto"}
