"""Small models of the families that can be halved, with random weights and random norm scales, in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

VOCAB = 99


def randomized(model: nn.Module, seed: int = 0, *, std: float = 0.25) -> Any:
    """The model in float64 with every weight drawn: norm scales around 1, biases around 0, so that nothing holds because a number is 1 or 0."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=draw, dtype=torch.float64))
    return model


GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip


def gemma_config(**changes: Any) -> transformers.Gemma4TextConfig:
    """Two stacks of sliding, sliding, full; one KV head of 32 in full layers, of which 8 dimensions turn."""
    own: dict[str, Any] = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "eos_token_id": None}
    return transformers.Gemma4TextConfig(**(GEMMA | own | changes))


def gemma(seed: int = 0, **changes: Any) -> Any:
    """A causal Gemma 4."""
    model = randomized(transformers.Gemma4ForCausalLM(gemma_config(**changes)), seed)
    if changes.get("enable_moe_block"):
        model.set_experts_implementation("eager")  # the fused one has no float64
    return model


def gemma_unified(seed: int = 0) -> Any:
    """The classes of the 12B model, which reads images and sound without an encoder."""
    changes = {"attention_k_eq_v": True, "eos_token_id": None}
    config = transformers.Gemma4UnifiedTextConfig(**(GEMMA | changes))
    return randomized(transformers.Gemma4UnifiedForCausalLM(config), seed)


PER_LAYER_INPUTS: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}


@st.composite
def gemma_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Heads, sizes, windows, eps, shared layers, soft caps and experts as the family has them."""
    heads = draw(st.sampled_from([1, 2, 4]))
    changes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([g for g in (1, 2) if heads % g == 0])),
        "num_global_key_value_heads": draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "global_head_dim": draw(st.sampled_from([16, 32, 64])),
        "sliding_window": draw(st.sampled_from([2, 5, 16])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0])),
        "num_kv_shared_layers": draw(st.sampled_from([0, 0, 2, 3])),
        "attention_bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        changes |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    if changes["num_kv_shared_layers"] or draw(st.booleans()):
        changes |= PER_LAYER_INPUTS  # without which Transformers 5.24 fails where layers share a cache
    return changes


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """Gemmas' norms computed in the dtype of the model. As they come they compute in float32, whose steps make of the last bit of a float64 number a jump
    of 6e-8, in any order of operations but one; nothing finer could be compared."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        normed = self._norm(hidden_states)
        return normed * self.weight if self.with_scale else normed

    norms = (
        modeling_gemma4.Gemma4RMSNorm,
        modeling_gemma4_unified.Gemma4UnifiedRMSNorm,
        modeling_diffusion_gemma.DiffusionGemmaRMSNorm,
    )
    kept = [norm.forward for norm in norms]
    for norm in norms:
        norm.forward = forward
    try:
        yield
    finally:
        for norm, own in zip(norms, kept, strict=True):
            norm.forward = own


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_NEOX = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
_OPT = {name: value for name, value in _NEOX.items() if name != "intermediate_size"}

MULTI_HEAD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=None)
    ),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_OPT)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(rotary_pct=0.5, **_NEOX)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**_SIZES)),
    "olmo": lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**_SIZES)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(attention_bias=True, **_SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=None, **_SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES)),
}

WINDOWED: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=5, **_SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(use_sliding_window=True, sliding_window=6, max_window_layers=1, **_SIZES)
    ),
}
"""Every layer, or the second, sees the last few tokens alone."""


# What a user calls T5 has many names; all are square here but for what a test changes.
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
_CROSSING: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

_WHISPER: dict[str, Any] = _CROSSING | {
    "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


def _gpt2_beside_an_encoder() -> nn.Module:
    """A GPT-2 with layers that read an encoder: its cross-attention is a fused projection of two."""
    encoder = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    decoder = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=2, bos_token_id=1,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


ENCODER_DECODER: dict[str, Callable[..., nn.Module]] = {
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_WHISPER)),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(max_position_embeddings=64, forced_eos_token_id=None, **_CROSSING)
    ),
    "gpt2 beside bert": _gpt2_beside_an_encoder,
    "t5": lambda **changes: transformers.T5ForConditionalGeneration(transformers.T5Config(**(_T5 | changes))),
    "mt5": lambda **changes: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**(_T5 | changes))),
    "umt5": lambda **changes: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**(_T5 | changes))),
    "longt5": lambda **changes: transformers.LongT5ForConditionalGeneration(
        transformers.LongT5Config(local_radius=4, **(_T5 | changes))
    ),
    "switch": lambda **changes: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(num_experts=2, **(_T5 | changes))
    ),
}


def source_of(name: str) -> dict[str, Tensor]:
    """What the encoder of one of :data:`ENCODER_DECODER` reads: two texts, the first of which begins late, or sound."""
    if name == "whisper":
        draw = torch.Generator().manual_seed(1)
        return {"input_features": torch.randn(2, 8, 40, dtype=torch.float64, generator=draw)}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": tokens(2, 9), "attention_mask": mask}


VISION: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 16, "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 32,
}  # fmt: skip
SIGNS = {"image_token_id": VOCAB - 1, "boi_token_id": VOCAB - 2, "eoi_token_id": VOCAB - 3}


def gemma_with_images(**changes: Any) -> Any:
    """The wrapper around text and vision."""
    config = transformers.Gemma4Config(
        text_config=gemma_config(**changes).to_dict(), vision_config=VISION, audio_config=None, **SIGNS
    )
    return randomized(transformers.Gemma4ForConditionalGeneration(config))


def diffusion_gemma() -> Any:
    """An encoder that fills a cache and a decoder that refines a block of text beside it."""
    text = GEMMA | {"num_hidden_layers": 3, "layer_types": GEMMA["layer_types"][:3]}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "final_logit_softcapping": 30.0}
    config = transformers.DiffusionGemmaConfig(
        text_config=text | experts, vision_config=VISION, canvas_length=6, **SIGNS
    )
    model = randomized(transformers.DiffusionGemmaForBlockDiffusion(config)).float()
    model.set_experts_implementation("eager")
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Tokens that are no padding."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of what each layer of one of Transformers' caches holds."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized]


def cache_of(output: Any) -> Any:
    """The cache among what a model or ``generate`` gives back, under the name that this release of Transformers has for it."""
    return output.get("cache", output.get("past_key_values"))


def going_on(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that has a forward pass go on from a cache."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
