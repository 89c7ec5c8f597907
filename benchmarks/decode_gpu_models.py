"""Whole models on a GPU with the Triton kernel of decoding and without: ours from caches that one graph serves, and layers of Gemma 4's shape, halved.

Of our own the model is that of 300M parameters with (Q, K=V), with learned positions and with rotary ones that are turned on reading; a step is one graph of
``torch.compile`` and, on a GPU, one CUDA graph, as ``generate`` runs it with a pre-allocated cache. The Gemma has four layers with the heads of Gemma 4 12B
(``benchmarks/halve.py``). Caches are filled with drawn numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from decoding import Decoder, Prefix
from halve import SHAPES, WAYS, filled, pair, step
from rows import Row, in_turn, ratio, row
from twofold.kernels import triton_decode
from twofold.models import build_model
from twofold.positions import LearnedPositions, RotaryPositions
from twofold.presets import preset
from twofold.spec import ModelSpec

TIE = "(Q, K=V)"
KERNELS = {"Triton": "triton_decode", "PyTorch": "sdpa"}
LENGTHS = (4096, 32768)
NEW_TOKENS = 32
GEMMA_CALLS = ((1, 32768), (1, 131072), (4, 131072))
"""Texts and tokens of each."""
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 33,
}


@contextmanager
def switched_off() -> Iterator[None]:
    """Without the kernel: it says that it serves nothing."""
    kept = triton_decode.why_not
    triton_decode.why_not = lambda _: "it is switched off"
    try:
        yield
    finally:
        triton_decode.why_not = kept


def model_rows(device: str, *, is_tiny: bool) -> Iterator[Row]:
    """Both kinds."""
    yield from gemma_rows(device, is_tiny=is_tiny)
    yield from our_rows(device, is_tiny=is_tiny)


def our_rows(device: str, *, is_tiny: bool) -> Iterator[Row]:
    """Tokens a second of our own model."""
    lengths, rounds, new_tokens = ((40,), 1, 2) if is_tiny else (LENGTHS, 7, NEW_TOKENS)
    spec = preset("paper-300m").with_changes(tie=TIE, dropout=0.0)
    spec = spec.with_changes(**TINY) if is_tiny else spec
    for words, positions in (
        ("learned positions", LearnedPositions(length=max(lengths) + (1 + rounds) * new_tokens + 4)),
        ("rotary positions", RotaryPositions()),
    ):
        own = spec.with_changes(positions=positions)
        for length in lengths:
            seconds = decoding_seconds(own, length, (device, rounds, new_tokens))
            at = f"{TIE}, {words}, {length:,} tokens"
            yield row(f"{at}: Triton / PyTorch, speed", ratio(seconds["PyTorch"], seconds["Triton"]), "ratio")
            for kernel, times in seconds.items():
                yield row(f"{at}: {kernel}", 1 / statistics.median(times), "tokens/s")


def decoding_seconds(spec: ModelSpec, length: int, how: tuple[str, int, int]) -> dict[str, list[float]]:
    """Seconds per token in each round. A cache serves all rounds, each of which goes on from the last: for another a step would be compiled anew."""
    device, rounds, new_tokens = how
    torch.compiler.reset()  # what was compiled for models that are gone counts against a limit
    decoders = {kernel: decoder_of(spec, backend, device) for kernel, backend in KERNELS.items()}
    prefix = Prefix(spec, length, torch.bfloat16, device)
    for decoder in decoders.values():
        decoder.start(prefix, (1 + rounds) * new_tokens)
    seconds: dict[str, list[float]] = {kernel: [] for kernel in decoders}
    for index in range(-1, rounds):  # the first is not counted: graphs are recorded in it
        for kernel in in_turn(list(decoders), max(0, index)):
            wait(device)
            start = time.perf_counter()
            for _ in range(new_tokens):
                decoders[kernel].step()
            wait(device)
            if index >= 0:
                seconds[kernel].append((time.perf_counter() - start) / new_tokens)
    return seconds


def decoder_of(spec: ModelSpec, backend: str, device: str) -> Decoder:
    """With a pre-allocated cache and, on a GPU, one CUDA graph for a step."""
    model = build_model(spec, seed=0, backend=backend).eval().to(torch.bfloat16).to(device)
    decoder = Decoder(model, "pre-allocated")
    if device == "cuda":
        decoder.way = "compiled"
        decoder.call = torch.compile(model.forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return decoder


def gemma_rows(device: str, *, is_tiny: bool) -> Iterator[Row]:
    """A token of the small Gemma 4: as it was, halved, and halved without the kernel."""
    shape = SHAPES["tiny" if is_tiny else "public"]
    calls, rounds = (((1, 64),), 1) if is_tiny else (GEMMA_CALLS, shape.rounds)
    shape = replace(shape, tokens=tuple(tokens for _, tokens in calls))
    models = pair("Gemma 4", shape, torch.bfloat16, device)
    before, halved = WAYS
    ways = (before, halved, f"{halved}, without the kernel")
    for batch, tokens in calls:
        caches = {way: filled(models[way], tokens, batch) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for index in range(-1, rounds):  # the first is not counted
            for way in in_turn(ways, max(0, index)):
                model, cache = (models[before], caches[before]) if way == before else (models[halved], caches[halved])
                if way == ways[2]:
                    with switched_off():
                        taken = step(model, cache, batch, device)
                else:
                    taken = step(model, cache, batch, device)
                if index >= 0:
                    seconds[way].append(taken)
        at = f"Gemma 4's shape, {batch} x {tokens:,} tokens"
        for other in (before, ways[2]):
            yield row(f"{at}: time of a token, halved / {other}", ratio(seconds[halved], seconds[other]), "ratio")
        for way, times in seconds.items():
            yield row(f"{at}: time of a token, {way}", 1e3 * statistics.median(times), "ms")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
