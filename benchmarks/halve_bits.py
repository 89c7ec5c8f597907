"""What is lost where a halved model's one tensor is held in few bits, on text: ``python benchmarks/halve.py --bits``.

Three small models with the attention of Gemma 4, GPT-2 and Llama 2 7B learn the source of Python's standard library byte by byte. Text that they were not
trained on is read in one pass, and then a token at a time from the cache; the logits of these steps are compared with those of the model as it was, in
float32. Every cached token is held in few bits, none of the last ones is spared. Beside it stand the same bits for keys and values, both held, which is
twice the bytes; and bfloat16, for weights and cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rows import Row, row
from twofold.cache import QuantizedTiedLayer
from twofold.cache_spec import BITS, CacheSpec
from twofold.existing import halve
from twofold.existing.low_bits import quantized_cache
from twofold.models.causal_lm import CACHE_FIELD
from twofold.tasks.corpus import standard_library

HELD_OUT_FROM = 0.9
"""The place of the first document, of 0 to 1, that no model is trained on."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much is trained on and read; lengths in bytes, which are tokens."""

    steps: int
    batch: int
    length: int
    texts: int
    first: int
    then: int


READINGS = {
    "public": Reading(steps=400, batch=16, length=128, texts=8, first=256, then=128),
    # Says whether the benchmark works, and nothing else.
    "tiny": Reading(steps=3, batch=2, length=32, texts=2, first=24, then=8),
}
WIDTH: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "eos_token_id": None,
}


def gemma() -> Gemma4ForCausalLM:
    """Two sliding and two full layers; one KV head of 64 in the full ones, of which a quarter turns."""
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
    }
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "attention_k_eq_v": True}
    return Gemma4ForCausalLM(Gemma4TextConfig(**WIDTH, **heads, **kinds, hidden_size_per_layer_input=0))


def gpt2() -> GPT2LMHeadModel:
    """Four heads of 32, and learned positions."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None)
    )


def llama() -> LlamaForCausalLM:
    """Four heads of 32 that turn."""
    return LlamaForCausalLM(LlamaConfig(**WIDTH, num_attention_heads=4, num_key_value_heads=4))


MODELS: Mapping[str, Callable[[], Any]] = {"Gemma 4": gemma, "GPT-2": gpt2, "Llama": llama}


class BothQuantizedLayer(QuantizedTiedLayer):
    """Keys and values in few bits, for a layer that is not halved."""

    _layer_type = "twofold_benchmark_both_quantized"

    def update(self, key_states: Tensor, value_states: Any = (), *_: Any, **__: Any) -> tuple[Tensor, Any]:
        """Append both."""
        key, value = self.append((key_states, value_states))
        return key, value


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes that are kept from it."""
    parts = [bytearray(), bytearray()]
    for document in standard_library():
        parts[document.place >= HELD_OUT_FROM] += document.content
    trained, held_out = (torch.frombuffer(part, dtype=torch.uint8).long() for part in parts)
    return trained, held_out


def windows(source: Tensor, count: int, length: int, draw: torch.Generator) -> Tensor:
    """[count, length], from drawn places."""
    starts = torch.randint(len(source) - length, (count, 1), generator=draw)
    return source[starts + torch.arange(length)]


def trained(name: str, reading: Reading, source: Tensor, device: str) -> Any:
    """A model that has learned something of it."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=reading.steps)
    for _ in range(reading.steps):
        rows = windows(source, reading.batch, reading.length, draw).to(device)
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def stepped(model: Any, text: Tensor, first: int, cache: Any = None) -> Tensor:
    """Logits [B, T, 256] of the tokens after the first, each read from the cache by itself."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(text[:, :first], **{CACHE_FIELD: cache})
    steps = range(first, text.shape[1])
    return torch.cat([model(text[:, [at]], **{CACHE_FIELD: cache}).logits for at in steps], dim=1).float()


def both_quantized(model: Any, indices: set[int], spec: CacheSpec) -> DynamicCache:
    """A cache whose layers ``indices`` hold keys and values in few bits."""
    cache = DynamicCache(config=model.config)
    while len(cache.layers) < model.config.num_hidden_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for index in indices:
        cache.layers[index] = BothQuantizedLayer(spec)
    return cache


def bits_per_byte(logits: Tensor, text: Tensor, first: int) -> float:
    """Of what comes after each of the steps but the last."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, first + 1 :].flatten())
    return nats.item() / torch.tensor(2.0).log().item()


def bit_rows(reading: Reading, device: str) -> Iterator[Row]:
    """Logits moved, over their size, and what that does to the loss."""
    source, held_out = texts()
    text = windows(held_out, reading.texts, reading.first + reading.then, torch.Generator().manual_seed(1)).to(device)
    for name in MODELS:
        model = trained(name, reading, source, device)
        exact = stepped(model, text, reading.first)
        size, loss = exact.square().mean().sqrt(), bits_per_byte(exact, text, reading.first)
        yield row(f"bits per byte of unseen text, {name}, of the 8 that it has", loss / 8, "ratio")
        for way, logits in answers(model, text, reading.first):
            goal = "<= 0.0001" if way == "one tensor, as computed" else None
            yield row(
                f"logits moved, {name}, {way}", float((logits - exact).square().mean().sqrt() / size), "ratio", goal
            )
            if "bits" in way:
                change = bits_per_byte(logits, text, reading.first) / loss
                yield row(f"bits per byte of unseen text, {name}, {way} / as it was", change, "ratio")


def answers(model: Any, text: Tensor, first: int) -> Iterator[tuple[str, Tensor]]:
    """The logits of every way in which the model's cache is held."""
    half = copy.deepcopy(model)
    report = halve(half)
    halved = {index for index, layer in enumerate(report.layers) if layer.is_halved}
    yield "one tensor, as computed", stepped(half, text, first)
    for bits in sorted(BITS, reverse=True):
        spec = CacheSpec(bits=bits)
        cache = quantized_cache(half, bits=bits, group_size=spec.group_size, tail_tokens=spec.tail_tokens)
        yield f"one tensor in {bits} bits", stepped(half, text, first, cache)
        yield f"keys and values in {bits} bits", stepped(model, text, first, both_quantized(model, halved, spec))
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    yield "bfloat16, as it was", stepped(rounded, text, first)
    halve(rounded, max_error=1.0)
    yield "bfloat16, one tensor", stepped(rounded, text, first)
