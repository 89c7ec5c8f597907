"""Half the cache of models that others trained: bytes, the growth of a process, the longest context, and the time of a token, before and after.

    python benchmarks/halve.py                                  # a table: about 5 minutes of two cores and 6 GiB
    python benchmarks/halve.py --json > docs/results/halve.json
    python benchmarks/halve.py --device cuda                    # the same on a GPU
    python benchmarks/halve.py --bits                           # what few bits do to logits on text (benchmarks/halve_bits.py): 6 minutes of a core

Two models with random weights: one with the heads of Gemma 4 12B (16 query heads on one KV head of 512, 128 of whose dimensions turn) and one multi-head
model with the heads of GPT-2 medium (16 of 64). Both are narrow elsewhere, so that attention is what is timed. Their caches are filled with drawn
numbers, because reading 32,768 tokens would take minutes and change nothing. Bytes are those of the running cache. The longest context of the
public Gemma 4 models is arithmetic: Transformers' own cache is asked without memory, the weights count 4 bits each.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, GPT2Config, GPT2LMHeadModel

from halve_bits import READINGS, bit_rows
from processes import output_of, resident_bytes
from rows import Row, in_turn, ratio, row, show
from twofold.estimate import Question, estimate_layers
from twofold.estimate.engine import inspect
from twofold.estimate.ways import EXACT, STORED, ways_of
from twofold.existing import halve
from twofold.models.causal_lm import CACHE_FIELD

WAYS = ("as it was", "halved")
GIGABYTES_24 = 24 * 10**9


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths and batches that are measured, and how wide the models are around their heads."""

    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    width: int
    heads: int
    head_dim: int
    global_head_dim: int
    window: int
    rounds: int


SHAPES = {
    "public": Shape(
        tokens=(512, 4096, 32768),
        batches=(1, 8),
        width=1024,
        heads=16,
        head_dim=256,
        global_head_dim=512,
        window=1024,
        rounds=9,
    ),
    # Says whether the benchmark works, and nothing else.
    "tiny": Shape(
        tokens=(64, 256), batches=(1, 2), width=64, heads=4, head_dim=16, global_head_dim=32, window=32, rounds=2
    ),
}
# From the files that their makers publish. 31B and 12B have dense layers, 26B-A4B has experts.
GEMMA_4: dict[str, dict[str, Any]] = {
    "12B": {
        "hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "26B-A4B": {
        "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "31B": {
        "hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "attention_k_eq_v": True, "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 262144, "vocab_size": 262144,
}  # fmt: skip


# Models


def gemma(shape: Shape) -> Gemma4ForCausalLM:
    """Two sliding and two full layers."""
    config = Gemma4TextConfig(
        vocab_size=256, hidden_size=shape.width, intermediate_size=shape.width, num_hidden_layers=4, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2, num_global_key_value_heads=1, head_dim=shape.head_dim, global_head_dim=shape.global_head_dim,
        attention_k_eq_v=True, sliding_window=shape.window, hidden_size_per_layer_input=0, eos_token_id=None,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=2 * max(shape.tokens),
    )  # fmt: skip
    return Gemma4ForCausalLM(config)


def gpt2(shape: Shape) -> GPT2LMHeadModel:
    """Four layers of heads of 64 that fill the width."""
    config = GPT2Config(
        vocab_size=256, n_embd=shape.width, n_layer=4, n_head=max(1, shape.width // 64), n_inner=shape.width, n_positions=2 * max(shape.tokens),
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS = {"Gemma 4": gemma, "GPT-2": gpt2}


def pair(name: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The model as it was, and halved."""
    torch.manual_seed(0)
    model: Any = MODELS[name](shape).to(dtype).to(device).eval()
    half = copy.deepcopy(model)
    halve(half, max_error=1.0)  # what rounding does is no question of time
    return {WAYS[0]: model, WAYS[1]: half}


@torch.no_grad()
def filled(model: Any, tokens: int, batch: int) -> DynamicCache:
    """A cache of so many tokens: what the model itself put in for two, and drawn numbers of the same shapes after them."""
    device = next(model.parameters()).device
    first = torch.zeros((batch, 2), dtype=torch.long, device=device)
    cache = model(first, use_cache=True)[CACHE_FIELD]
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", 0)
        kept = min(tokens, window - 1) if window else tokens
        layer.keys, layer.values = (_drawn(tensor, kept) for tensor in (layer.keys, layer.values))
        if window:
            layer.cumulative_length = tokens
    return cache


def _drawn(like: Tensor, tokens: int) -> Tensor:
    shape = (*like.shape[:2], tokens, like.shape[3])
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def held(cache: DynamicCache) -> list[int]:
    """Bytes of each layer."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


# Rows


def byte_rows(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Row]:
    """Of the running caches: layers that were halved, and the whole."""
    for name in MODELS:
        models = pair(name, shape, dtype, device)
        for tokens in shape.tokens:
            before, after = (held(filled(models[way], tokens, 1)) for way in WAYS)
            halved = [index for index, (b, a) in enumerate(zip(before, after, strict=True)) if a < b]
            part = sum(after[index] for index in halved) / sum(before[index] for index in halved)
            yield row(f"cache of the halved layers, {name}, {tokens:,} tokens", part, "ratio", "<= 0.501")
            yield row(f"cache of all layers, {name}, {tokens:,} tokens", sum(after) / sum(before), "ratio")


def growth_rows(shape_name: str, dtype: str, device: str) -> Iterator[Row]:
    """Memory of a fresh process over the two longest lengths, against what is counted."""
    for name in MODELS:
        grown = {}
        for way in WAYS:
            options = ["--point", name, way, "--shape", shape_name, "--dtype", dtype, "--device", device]
            grown[way] = json.loads(output_of(__file__, *options))
        yield row(
            f"memory that a process grows by, {name}, halved / as it was",
            grown[WAYS[1]]["measured"] / grown[WAYS[0]]["measured"],
            "ratio",
        )
        for way in WAYS:
            measured, counted = grown[way]["measured"], grown[way]["counted"]
            yield row(
                f"memory that a process grows by, {name}, {way}, measured / counted",
                measured / counted,
                "ratio",
                "<= 1.05",
            )


def point(name: str, way: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, float]:
    """In a process of its own: bytes between the two longest lengths."""
    model = pair(name, shape, dtype, device)[way]
    sizes, counts = [], []
    filled(model, 64, 1)
    for tokens in shape.tokens[-2:]:
        start = _allocated(device)
        cache = filled(model, tokens, 1)
        sizes.append(_allocated(device) - start)
        counts.append(sum(held(cache)))
        del cache
    return {"measured": sizes[1] - sizes[0], "counted": counts[1] - counts[0]}


def _allocated(device: str) -> int:
    if device == "cpu":
        return resident_bytes()
    gc.collect()
    return torch.cuda.memory_allocated()


def time_rows(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Row]:
    """A token from a cache of each length and batch: halved over as it was, side by side."""
    for name in MODELS:
        models = pair(name, shape, dtype, device)
        for batch in shape.batches:
            for tokens in shape.tokens:
                caches = {way: filled(models[way], tokens, batch) for way in WAYS}
                times: dict[str, list[float]] = {way: [] for way in WAYS}
                for round_index in range(-1, shape.rounds):  # the first is not counted
                    for way in in_turn(WAYS, max(0, round_index)):
                        seconds = step(models[way], caches[way], batch, device)
                        if round_index >= 0:
                            times[way].append(seconds)
                where = f"{name}, batch {batch}, {tokens:,} tokens"
                yield row(
                    f"time of a token, {where}, halved / as it was", ratio(times[WAYS[1]], times[WAYS[0]]), "ratio"
                )
                yield row(f"time of a token, {where}, as it was", 1e3 * statistics.median(times[WAYS[0]]), "ms")


@torch.no_grad()
def step(model: Any, cache: DynamicCache, batch: int, device: str) -> float:
    """Seconds of one token, which is then forgotten."""
    token = torch.zeros((batch, 1), dtype=torch.long, device=device)
    kept = [(layer.keys, layer.values, getattr(layer, "cumulative_length", 0)) for layer in cache.layers]
    _wait(device)
    begun = time.perf_counter()
    model(token, **{CACHE_FIELD: cache})
    _wait(device)
    seconds = time.perf_counter() - begun
    for layer, (keys, values, length) in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return seconds


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def context_rows(shape: Shape, dtype: torch.dtype) -> Iterator[Row]:
    """The public models by arithmetic, which is first held to the running caches of the small one."""
    small = pair("Gemma 4", shape, dtype, "cpu")
    tokens = shape.tokens[-1]
    counted = bytes_of(small[WAYS[0]].config, tokens, dtype.itemsize)
    for way, name in zip(WAYS, (STORED, EXACT), strict=True):
        measured = sum(held(filled(small[way], tokens, 1)))
        yield row(
            f"bytes of a cache, small Gemma 4, {way}, measured / counted", measured / counted[name], "ratio", "<= 1.001"
        )
    for name, sizes in GEMMA_4.items():
        config = Gemma4TextConfig(**COMMON, **sizes)
        question = Question(tokens=32768, memory=GIGABYTES_24)
        found = {
            holding.name: holding for holding in _estimate(config, question, weight_bits=4).holdings if not holding.bits
        }
        for way, words in ((STORED, "as stored"), (EXACT, "one tensor")):
            where = f"in 24 GB beside Gemma 4 {name} in 4 bits, {words}"
            yield row(f"longest text {where}", found[way].longest_context or 0, "tokens")
            yield row(f"texts of 32,768 tokens {where}", found[way].largest_batch or 0, "texts")


def bytes_of(config: Gemma4TextConfig, tokens: int, width: int) -> dict[str, int]:
    """What is counted for a configuration, by the way in which it is held."""
    table = _estimate(config, Question(tokens=tokens, dtype="bf16" if width == 2 else "fp32"), weight_bits=16)
    return {holding.name: holding.cache_bytes for holding in table.holdings if not holding.bits}


def _estimate(config: Gemma4TextConfig, question: Question, weight_bits: int) -> Any:
    config.architectures = ["Gemma4ForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = inspect(Path(folder))
    return estimate_layers(
        ways_of(found.layers, found.read, found.fields),
        found.name,
        question,
        parameters=found.parameters,
        weight_bytes=found.parameters * weight_bits // 8,
        position_limit=config.max_position_embeddings,
    )


def main(options: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows for programs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="type of weights and caches")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="public")
    parser.add_argument("--bits", action="store_true", help="what holding in few bits does on text, and nothing else")
    parser.add_argument("--point", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"there is no {arguments.device} here: use --device cpu")
    shape, dtype = SHAPES[arguments.shape], {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    if arguments.point:
        print(json.dumps(point(*arguments.point, shape, dtype, arguments.device)))
        return
    if arguments.bits:
        show([*bit_rows(READINGS[arguments.shape], arguments.device)], as_json=arguments.json)
        return
    rows = [
        *byte_rows(shape, dtype, arguments.device),
        *growth_rows(arguments.shape, arguments.dtype, arguments.device),
        *context_rows(shape, dtype),
        *time_rows(shape, dtype, arguments.device),
    ]
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
