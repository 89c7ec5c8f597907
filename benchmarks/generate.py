"""Decoding from caches of 512 to 32,768 tokens: (Q, K=V) against (Q, K, V), however the cache is held, and Transformers' own GPT-2 and Llama beside them.

    python benchmarks/generate.py                           # a table
    python benchmarks/generate.py --json                    # rows for programs
    python benchmarks/generate.py --lengths 512 2048        # fewer lengths
    python benchmarks/generate.py --leave-out compiled peers

The model is that of 300M parameters with one sequence, learned positions, 80 against 40 KiB of cache per token in bf16 (twice that in float32; without
``--dtype``, what this machine is faster with). Caches are filled with streams drawn at random, as reading the text would take minutes, and decoding
goes on from there, greedily, with the model's own forward pass. Ways to hold the cache: "growing" appends to tensors (Transformers'
DynamicCache), "pre-allocated" writes into room taken at once (StaticCache), "compiled" is the same in one graph of torch.compile, for 2,048 tokens.
From 8,192 tokens (Q, K=V) also decodes from 8 bits: "pre-allocated codes", which the kernel reads as they are held, and "growing 8 bits", which become floats
at every step.

In each round every decoder in turn fills its cache, decodes some tokens that are timed, and drops it; a ratio is the median over rounds of the
ratio within a round. The GPT-2 has our weights and is checked to be the same function; the Llama has as many, drawn at random. Two quiet cores
take nine minutes and 16 GiB of memory, most of both at 32,768 tokens.

How fast it could be at most is said too: a token needs every weight and the whole cache read once, at the bandwidth that is measured first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from decoding import CODED, FEW_BITS, OUR_WAYS, QUANTIZED, TIES, Decoder, Prefix, decoders, gpt2_like
from filling import DTYPES
from rows import Row, in_turn, ratio, row, show
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes, dtype_bytes, parameters
from twofold.models import build_model
from twofold.positions import LearnedPositions
from twofold.presets import preset
from twofold.spec import ModelSpec

THREE, TWO = TIES
PARTS = ("compiled", "peers", "bits", "loop", "prompt")
MANY_TOKENS = 16384
Seconds = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model; lengths of its cache, those at which a step is compiled, the least of few bits, that of the loop without a cache, and that of a prompt."""

    spec: ModelSpec
    lengths: tuple[int, ...]
    compiled: tuple[int, ...]
    bits_from: int
    loop: int
    prompt: int

    def new_tokens(self, length: int) -> int:
        """Tokens that are timed at once: many where each takes little."""
        return max(3, min(8, 32768 // length))

    def times(self, way: str, length: int) -> bool:
        """Whether a way to hold the cache is timed at a length."""
        return length in self.compiled if way == "compiled" else length >= self.bits_from or way not in FEW_BITS


SHAPES = {
    "paper-300m": Shape(
        spec=preset("paper-300m"),
        lengths=(512, 2048, 8192, 32768),
        compiled=(2048,),
        bits_from=8192,
        loop=2048,
        prompt=512,
    ),
    # Says whether the benchmark works, and nothing about speed.
    "tiny": Shape(
        spec=preset("paper-300m").with_changes(
            vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, intermediate_size=33,
        ),
        lengths=(16, 40),
        compiled=(16,),
        bits_from=40,
        loop=16,
        prompt=7,
    ),
}  # fmt: skip


# What the machine can do


def seconds_of(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth(device: str, megabytes: int = 512) -> dict[str, float]:
    """Bytes per second of reading, and of copying (read and written), from the fastest of some passes over more than any processor keeps."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    passes = {"read": source.sum, "copy": lambda: target.copy_(source)}
    best = {name: min(seconds_of(work, device) for _ in range(7)) for name, work in passes.items()}
    return {"read": source.nbytes / best["read"], "copy": 2 * source.nbytes / best["copy"]}


def fastest_dtype(spec: ModelSpec, device: str) -> str:
    """In which a linear map and an attention over 4,096 keys, of one token, take the least time, layer after layer."""
    taken = {}
    for name, dtype in DTYPES.items():
        width, layers = spec.hidden_size, range(spec.num_hidden_layers)
        matrices = [torch.ones(spec.intermediate_size, width, dtype=dtype, device=device) for _ in layers]
        keys = [
            torch.ones(1, spec.num_attention_heads, 4096, spec.head_dim, dtype=dtype, device=device) for _ in layers
        ]
        token = torch.ones(1, width, dtype=dtype, device=device)

        def work(matrices: list[Tensor] = matrices, keys: list[Tensor] = keys, token: Tensor = token) -> None:
            for matrix, key in zip(matrices, keys, strict=True):
                F.linear(token, matrix)
                F.scaled_dot_product_attention(key[:, :, :1], key, key)

        taken[name] = min(seconds_of(work, device) for _ in range(5))
    return min(taken, key=taken.__getitem__)


# What is timed


def time_decoding(
    all_decoders: dict[str, Decoder], prefix: Prefix, new_tokens: int, rounds: int, device: str
) -> Seconds:
    """Seconds per token in each round."""
    seconds: Seconds = {name: [] for name in all_decoders}
    for index in range(rounds):
        for name in in_turn(list(all_decoders), index):
            decoder = all_decoders[name]
            decoder.start(prefix, new_tokens)
            taken = seconds_of(lambda decoder=decoder: [decoder.step() for _ in range(new_tokens)], device)
            seconds[name].append(taken / new_tokens)
            decoder.stop()
    return seconds


def time_each(work: dict[str, Callable[[], object]], rounds: int, device: str) -> Seconds:
    """Seconds in each round, after one that does not count."""
    seconds: Seconds = {name: [] for name in work}
    for index in range(-1, rounds):
        for name in in_turn(list(work), index):
            taken = seconds_of(work[name], device)
            if index >= 0:
                seconds[name].append(taken)
    return seconds


@torch.no_grad()
def check_same_function(spec: ModelSpec) -> None:
    """Raise AssertionError unless the GPT-2 that is timed beside ours computes what ours does."""
    small = spec.with_changes(num_hidden_layers=2, vocab_size=97, positions=LearnedPositions(length=33))
    ours = build_model(small, seed=0).eval()
    draws = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():  # as large as those of a trained model: what is newly drawn hardly attends
        parameter.normal_(std=0.3 * (64 / spec.hidden_size) ** 0.5, generator=draws)
    ids = torch.randint(97, (2, 33), generator=draws)
    theirs = gpt2_like(ours, small).double()(ids).logits
    torch.testing.assert_close(theirs, ours.double()(ids).logits, rtol=1e-9, atol=1e-9)


# What is said


def length_rows(seconds: Seconds, length: int) -> list[Row]:
    """At one length: goals first, then peers."""
    at = f"speed at {length:,} tokens"
    ways = sorted((way for way in OUR_WAYS if f"{TWO}, {way}" in seconds), key=len)
    rows = []
    for way in ways:
        faster = ratio(seconds[f"{THREE}, {way}"], seconds[f"{TWO}, {way}"])
        rows.append(row(f"{at}, {TWO} / {THREE}, {way}", faster, "ratio", ">= 1.0"))
    for tie in TIES:
        for way in ways[1:]:
            faster = ratio(seconds[f"{tie}, growing"], seconds[f"{tie}, {way}"])
            rows.append(row(f"{at}, {way} / growing, {tie}", faster, "ratio", ">= 1.0"))
    if f"{TWO}, {CODED}" in seconds:
        for way in ("pre-allocated", QUANTIZED):
            faster = ratio(seconds[f"{TWO}, {way}"], seconds[f"{TWO}, {CODED}"])
            rows.append(row(f"{at}, {CODED} / {way}, {TWO}", faster, "ratio", ">= 1.0"))
    for name in seconds:
        peer, way = name.rsplit(", ", 1)
        if peer not in TIES:
            rows += [
                row(f"{at}, {tie} / {peer}, {way}", ratio(seconds[name], seconds[f"{tie}, {way}"]), "ratio")
                for tie in TIES
            ]
    return rows


def bound_rows(spec: ModelSpec, length: int, dtype: str, bytes_per_second: float) -> list[Row]:
    """What a token must read, and how many tokens a second that leaves."""
    rows = []
    held = {tie: (tie, CacheSpec()) for tie in TIES} | {f"{TWO}, {CODED}": (TWO, FEW_BITS[CODED])}
    for name, (tie, cache) in held.items():
        own = spec.with_changes(tie=tie)
        # One row of the table of positions; all rows of that of tokens, which is the head too.
        weights = (parameters(own) - own.positions.max_positions * own.hidden_size) * dtype_bytes(dtype)
        read = weights + cache_bytes(own, length, dtype, cache=cache)
        rows.append(row(f"read per token at {length:,} tokens, {name}", read / 2**20, "MiB"))
        rows.append(row(f"bound at {length:,} tokens, {name}", bytes_per_second / read, "tokens/s"))
    return rows


def loop_rows(all_decoders: dict[str, Decoder], shape: Shape, cached: Seconds, device: str) -> list[Row]:
    """A loop that computes everything again for each token."""
    text = torch.arange(shape.loop, device=device)[None] % shape.spec.vocab_size
    work = {tie: lambda tie=tie: all_decoders[f"{tie}, growing"].token_without_cache(text) for tie in TIES}
    seconds = time_each(work, 1, device)
    at = f"speed at {shape.loop:,} tokens"
    rows = [
        row(
            f"{at}, cache / no cache, {tie}",
            statistics.median(seconds[tie]) / statistics.median(cached[f"{tie}, growing"]),
            "ratio",
            ">= 20",
        )
        for tie in TIES
    ]
    return rows + [row(f"{at}, {tie}, no cache", 1 / statistics.median(seconds[tie]), "tokens/s") for tie in TIES]


def prompt_rows(all_decoders: dict[str, Decoder], shape: Shape, rounds: int, device: str) -> list[Row]:
    """From a prompt to its first token."""
    prompt = torch.arange(shape.prompt, device=device)[None] % shape.spec.vocab_size
    names = [name for name in all_decoders if name.endswith("growing")]
    seconds = time_each(
        {name: lambda name=name: all_decoders[name].first_token(prompt) for name in names}, rounds, device
    )
    what = f"time to the first token after {shape.prompt:,}"
    rows = [
        row(
            f"{what}, {TWO} / {THREE}",
            ratio(seconds[f"{TWO}, growing"], seconds[f"{THREE}, growing"]),
            "ratio",
            "<= 1.0",
        )
    ]
    for name in names:
        peer = name.removesuffix(", growing")
        if peer not in TIES:
            rows += [
                row(f"{what}, {tie} / {peer}", ratio(seconds[f"{tie}, growing"], seconds[name]), "ratio")
                for tie in TIES
            ]
    return rows + [
        row(f"{what}, {name.removesuffix(', growing')}", 1000 * statistics.median(values), "ms")
        for name, values in seconds.items()
    ]


def all_rows(shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    device, lengths = arguments.device, arguments.lengths or shape.lengths
    spec = shape.spec.with_changes(positions=LearnedPositions(length=max(*lengths, shape.loop) + 64), dropout=0.0)
    dtype = arguments.dtype or fastest_dtype(spec, device)
    speed = bandwidth(device)
    check_same_function(spec)
    parts = {name: name not in arguments.leave_out for name in PARTS}
    found = decoders(
        spec, DTYPES[dtype], device,
        has_compiled=parts["compiled"], has_peers=parts["peers"], has_bits=parts["bits"],
    )  # fmt: skip
    rows, speeds, bounds = [], [], []
    for length in lengths:
        start = time.perf_counter()
        own = {name: one for name, one in found.items() if shape.times(one.way, length)}
        prefix = Prefix(spec, length, DTYPES[dtype], device)
        rounds = arguments.rounds if length <= MANY_TOKENS else (arguments.rounds + 1) // 2
        seconds = time_decoding(own, prefix, shape.new_tokens(length), rounds, device)
        rows += length_rows(seconds, length)
        bounds += bound_rows(spec, length, dtype, speed["read"])
        for name, values in seconds.items():
            speeds.append(row(f"speed at {length:,} tokens, {name}", 1 / statistics.median(values), "tokens/s"))
        del prefix
        print(f"{length:,} tokens took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if length == shape.loop and parts["loop"]:
            rows += loop_rows(found, shape, seconds, device)
    if parts["prompt"]:
        rows += prompt_rows(found, shape, 2 * arguments.rounds, device)
    speeds += [row(f"memory bandwidth, {name}", value / 1e9, "GB/s") for name, value in speed.items()]
    return [*rows, *speeds, *bounds, row("bytes of a float", dtype_bytes(dtype), "bytes")]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="paper-300m", help="size of the models, and lengths")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="cached tokens (without it: the shape's)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help=f"at each length (5; half beyond {MANY_TOKENS:,} tokens, and twice for a prompt)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and caches (without it: the faster one here)")
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        choices=PARTS,
        help="what not to measure",
    )
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --device cpu")
    if arguments.rounds < 1 or (arguments.lengths and min(arguments.lengths) < 1):
        parser.error("rounds and lengths must be 1 or more")
    show(all_rows(SHAPES[arguments.shape], arguments), as_json=arguments.json)


if __name__ == "__main__":
    main()
