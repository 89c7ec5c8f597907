"""Models that decode token by token from a cache of any length: ours in three ways (with one tensor in five), Transformers' GPT-2 and Llama in two.

All of one head count start from the same keys (and values), drawn once (:class:`Prefix`). A cache that grows takes them as they are and copies
them with its first token; one with pre-allocated room is written at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from twofold.cache import LayerView, TiedCache
from twofold.cache_spec import CacheSpec
from twofold.layouts import convert
from twofold.models import build_model
from twofold.models.causal_lm import CACHE_FIELD
from twofold.spec import ModelSpec

TIES = ("(Q, K, V)", "(Q, K=V)")
OUR_WAYS = ("growing", "pre-allocated", "compiled")
PEER_WAYS = ("growing", "pre-allocated")
CODED, QUANTIZED = "pre-allocated codes", "growing 8 bits"
FEW_BITS = {CODED: CacheSpec(bits=8, axis="head"), QUANTIZED: CacheSpec(bits=8)}
"""Codes that kernels read as they are held, and codes in groups that become floats at every step."""


class Prefix:
    """Keys and values [1, G, S, D] of S tokens for every layer, each in memory of its own: a cache of one layer would stay in the processor's."""

    def __init__(self, spec: ModelSpec, tokens: int, dtype: torch.dtype, device: str) -> None:
        shape = (1, spec.num_key_value_heads, tokens, spec.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        key, value = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(2))
        self.tokens = tokens
        self.layers = [(key.clone(), value.clone()) for _ in range(spec.num_hidden_layers)]

    def into_ours(self, cache: TiedCache) -> None:
        """Append as many streams as each layer caches."""
        for index, streams in enumerate(self.layers):
            LayerView(cache, index).update(streams[: cache.attention_specs[index].tie.cached_tensors])

    def into_theirs(self, cache: Cache) -> None:
        """The same for keys and values held apart."""
        for layer, (key, value) in zip(cache.layers, self.layers, strict=True):
            if isinstance(cache, StaticCache):
                layer.update(key, value)
            else:
                layer.lazy_initialization(key, value)
                layer.keys, layer.values = key, value


class Decoder:
    """A model and a way to hold its cache: ``start`` fills one, ``step`` decodes the next token, ``stop`` drops it."""

    def __init__(self, model: nn.Module, way: str) -> None:
        self.model, self.way = model, way
        self.cache: Cache | None = None
        self.call: Callable[..., Any] = model.forward
        if way == "compiled":
            self.call = torch.compile(model.forward, fullgraph=True, dynamic=False)

    @property
    def is_ours(self) -> bool:
        """Whether it takes a tied cache."""
        return hasattr(self.model.config, "spec")

    def new_cache(self, max_tokens: int = 0) -> Cache:
        """An empty one; with room for ``max_tokens`` unless it grows."""
        max_tokens = 0 if self.way.startswith("growing") else max_tokens
        if self.is_ours:
            held = replace(FEW_BITS.get(self.way, CacheSpec()), max_tokens=max_tokens)
            return TiedCache(self.model.config.spec, held)
        if max_tokens:
            return StaticCache(config=self.model.config, max_cache_len=max_tokens)
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def start(self, prefix: Prefix, new_tokens: int) -> None:
        """Fill a cache with the prefix, decode one token that is not timed, and compile where that is to be done."""
        self.cache = self.new_cache(prefix.tokens + new_tokens + 2)
        (prefix.into_ours if self.is_ours else prefix.into_theirs)(self.cache)
        device = next(self.model.parameters()).device
        self.token = torch.zeros((1, 1), dtype=torch.long, device=device)
        # The first token after a prompt is read eagerly in generate too: what a cache remembers is made then.
        self.token = self._next(self.model.forward, self.token)
        if self.way == "compiled":
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """The likeliest next token."""
        self.token = self._next(self.call, self.token)

    def _next(self, call: Callable[..., Any], tokens: Tensor) -> Tensor:
        return call(tokens, **{CACHE_FIELD: self.cache}).logits[:, -1:].argmax(dim=-1)

    def stop(self) -> None:
        """Give the memory back."""
        self.cache = None

    @torch.no_grad()
    def first_token(self, prompt: Tensor) -> Tensor:
        """The token after a prompt [1, S], into a cache of its own."""
        options = {CACHE_FIELD: self.new_cache(prompt.shape[1] + 1), "logits_to_keep": 1}
        return self.model(prompt, **options).logits[:, -1:].argmax(dim=-1)

    @torch.no_grad()
    def token_without_cache(self, text: Tensor) -> Tensor:
        """The token after a text [1, S], everything computed again."""
        return self.model(text, use_cache=False, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)


def gpt2_like(ours: nn.Module, spec: ModelSpec) -> GPT2LMHeadModel:
    """Transformers' GPT-2 with our model's numbers: the same function."""
    length = spec.positions.max_positions
    config = GPT2Config(
        vocab_size=spec.vocab_size, n_positions=length, n_embd=spec.hidden_size, n_layer=spec.num_hidden_layers,
        n_head=spec.num_attention_heads, n_inner=spec.intermediate_size, activation_function="gelu",
        layer_norm_epsilon=spec.norm_eps, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, weights = GPT2LMHeadModel(config), ours.state_dict()
    names = {
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.qkv_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    new = {f"transformer.ln_f.{kind}": weights[f"trunk.norm.{kind}"] for kind in ("weight", "bias")}
    new["transformer.wte.weight"] = new["lm_head.weight"] = weights["embedding.tokens.weight"]
    new["transformer.wpe.weight"] = weights["embedding.positions.weight"]
    for layer in range(spec.num_hidden_layers):
        prefix, attention = f"trunk.layers.{layer}.", spec.attention(layer)
        fused = convert(weights, attention, source="free", target="fused", prefix=f"{prefix}attention.")
        for mine, theirs in names.items():
            for kind in ("weight", "bias"):
                found = fused[f"{prefix}{mine}.{kind}"]
                # Conv1D is a linear map with its matrix the other way round.
                is_turned = kind == "weight" and "norm" not in mine
                new[f"transformer.h.{layer}.{theirs}.{kind}"] = found.T if is_turned else found
    model.load_state_dict(new)
    return model.eval()


def llama_like(spec: ModelSpec) -> LlamaForCausalLM:
    """Transformers' Llama with the same heads, layers and vocabulary; its gated MLP has as many weights as two matrices of ours."""
    config = LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=2 * spec.intermediate_size // 3,
        num_hidden_layers=spec.num_hidden_layers, num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads, head_dim=spec.head_dim, tie_word_embeddings=True,
        max_position_embeddings=spec.positions.max_positions, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def decoders(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: str,
    *,
    has_compiled: bool = True,
    has_peers: bool = True,
    has_bits: bool = True,
) -> dict[str, Decoder]:
    """All of them, by ``model, way``; the ways of one model share its weights. Few bits are for one tensor alone."""
    models = {tie: build_model(spec.with_changes(tie=tie), seed=0).eval() for tie in TIES}
    ways = dict.fromkeys(TIES, OUR_WAYS if has_compiled else OUR_WAYS[:-1])
    if has_bits:
        ways[TIES[1]] += tuple(FEW_BITS)
    if has_peers:
        models |= {"GPT-2": gpt2_like(models["(Q, K, V)"], spec), "Llama": llama_like(spec)}
        ways |= dict.fromkeys(("GPT-2", "Llama"), PEER_WAYS)
    models = {name: model.to(dtype).to(device) for name, model in models.items()}
    return {f"{name}, {way}": Decoder(models[name], way) for name in models for way in ways[name]}
