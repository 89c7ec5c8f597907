"""Models for tests: any language model at all, with float64 weights drawn so widely that attention matters; sizes are small and odd."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention_strategies import POSITIONS, UNTIED, has_latent, ties_for
from twofold.models import TwofoldPreTrainedModel, build_model
from twofold.spec import GPT2_BLOCK, LLAMA_BLOCK, ModelSpec
from twofold.tie import TiePattern

VOCABULARY = 37

GPT2 = ModelSpec(
    tie="(Q, K, V) | (Q, K=V)",
    architecture="causal_lm",
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=19,
    vocab_size=VOCABULARY,
    positions=POSITIONS["learned"],
    **GPT2_BLOCK,
)
LLAMA = GPT2.with_changes(
    tie="(Q, K=V)", num_attention_heads=4, positions=POSITIONS["rotary"], qk_norm=True, **LLAMA_BLOCK
)
SET = GPT2.with_changes(
    architecture="token_classification",
    tie="(Q=K, V) | (Q=K=V)",
    vocab_size=0,
    feature_size=5,
    num_labels=3,
    positions=POSITIONS["none"],
    causal=False,
)
IMAGE = GPT2.with_changes(
    architecture="image_classification",
    vocab_size=0,
    image_size=15,
    patch_size=5,
    num_channels=3,
    num_labels=7,
    causal=False,
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "set": SET, "image": IMAGE}


@st.composite
def decoders(draw: st.DrawFn, *, positions: str | None = None) -> ModelSpec:
    """A causal_lm of two layers: any tie in each or a latent, any heads, positions and windows."""
    scheme = POSITIONS[positions or draw(st.sampled_from(sorted(POSITIONS)))]
    pattern = TiePattern(tuple(draw(st.lists(ties_for(scheme), min_size=1, max_size=2))))
    latent = draw(st.sampled_from([8, 24])) if has_latent(scheme) and draw(st.integers(0, 3)) == 0 else 0
    pattern = TiePattern((UNTIED,)) if latent else pattern
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = 1 if latent or any(tie.needs_equal_heads for tie in pattern.ties) else draw(st.sampled_from([1, 3]))
    return GPT2.with_changes(
        tie=pattern,
        hidden_size=draw(st.sampled_from([5, 11])),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        positions=scheme,
        qk_norm=not latent and draw(st.booleans()),
        latent_dim=latent,
        use_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        gated_mlp=draw(st.booleans()),
        window_tokens=draw(st.sampled_from([(0,), (1,), (3,), (50,), (2, 0), (0, 5)])),
        tie_word_embeddings=draw(st.booleans()),
    )


def drawn_model(spec: ModelSpec, seed: int = 0, *, std: float = 0.5, **options: Any) -> TwofoldPreTrainedModel:
    """In evaluation mode and float64: with first weights of 0.02 every error of attention would be a small one."""
    model = build_model(spec, seed=0, **options).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            if "norm" in name and name.endswith("weight"):
                drawn += 1.0
            # With biases as large as weights, a small model says the same whatever it reads.
            parameter.copy_(0.2 * drawn if name.endswith("bias") else drawn)
    return model


def drawn_tokens(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def drawn_inputs(
    spec: ModelSpec, seed: int = 0, batch: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Arguments of ``forward``, labels among them."""
    generator = torch.Generator().manual_seed(seed)
    if spec.architecture == "image_classification":
        images = torch.randn(
            batch, spec.num_channels, spec.image_size, spec.image_size, generator=generator, dtype=dtype
        )
        return {"pixel_values": images, "labels": torch.randint(spec.num_labels, (batch,), generator=generator)}
    tokens = torch.randint(spec.vocab_size or 1, (batch, 7), generator=generator)
    if spec.architecture == "causal_lm":
        return {"input_ids": tokens, "labels": tokens}
    labels = torch.randint(spec.num_labels, (batch, 7), generator=generator)
    if spec.vocab_size:
        return {"input_ids": tokens, "labels": labels}
    features = torch.randn(batch, 7, spec.feature_size, generator=generator, dtype=dtype)
    return {"features": features, "labels": labels}


def recompute_layers(model: TwofoldPreTrainedModel) -> None:
    """Gradient checkpointing, by whichever name the installed Transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
