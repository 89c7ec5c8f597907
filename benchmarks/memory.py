"""What a cache occupies, measured on the process: growth per cached token of every kind of cache against the formula, and what fits in a budget.

    python benchmarks/memory.py                                            # a table
    python benchmarks/memory.py --json --picture memory.svg > memory.json  # rows for programs, and the figure
    python benchmarks/memory.py --rows memory.json --picture memory.svg    # the figure again, of rows that were kept

Every variant is measured in fresh processes. On a CPU it is the resident memory after free memory was given back; the peak, which has the layer
that was growing twice, stands beside it. On a GPU it is allocated memory, and caches that are held as computed have their room pre-allocated for
each point, as ``cache_implementation="static"`` does, so that the peak is held to the formula too.

The cache is the real one and grows through its own ``update``, but what it is given is drawn at random, in chunks of the shapes that the model
would bring: reading 32,768 tokens with 300M parameters takes two cores a quarter of an hour. That this is the same is measured at one length, where
the real model reads a text. What fits in a budget is found with the real model too: the largest batch of a fixed length whose weights, cache
and next token fit, where more than the budget is refused (by the system's limit on a process's data on a CPU, by PyTorch's on a GPU).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from filling import DTYPES, fill
from memory_picture import picture
from processes import STATUS, output_of, peak_resident_bytes, resident_bytes, status_bytes
from rows import Row, row, show
from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes
from twofold.models import build_model
from twofold.positions import LearnedPositions
from twofold.presets import preset
from twofold.spec import ModelSpec

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model's tie and KV heads, and in how many bits its cache is held (0: as computed)."""

    tie: str
    halves_heads: bool = False
    bits: int = 0

    @property
    def name(self) -> str:
        """As rows call it."""
        return self.tie + ", half the KV heads" * self.halves_heads + f", {self.bits} bits" * bool(self.bits)

    @property
    def held(self) -> CacheSpec:
        """How its cache is held."""
        return CacheSpec(bits=self.bits)

    def of(self, spec: ModelSpec) -> ModelSpec:
        """Its model."""
        heads = spec.num_attention_heads // (2 if self.halves_heads else 1)
        return spec.with_changes(tie=self.tie, num_key_value_heads=heads)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured: a model, the lengths of its cache, the length that the real model reads, and the budget."""

    spec: ModelSpec
    dtype: str
    tokens: tuple[int, ...]
    read_tokens: int
    budget_bytes: int
    budget_context: int


THREE, TWO = "(Q, K, V)", "(Q, K=V)"
VARIANTS = {
    variant.name: variant
    for variant in (
        *(Variant(tie=tie, bits=bits) for bits in (0, 8, 4) for tie in (THREE, TWO)),
        *(Variant(tie=tie, halves_heads=True) for tie in (THREE, TWO)),
    )
}
SHAPES = {
    # The preset's own 2,048 positions do not reach: the table is longer here, and nothing else changes.
    "paper-300m": Shape(
        spec=preset("paper-300m").with_changes(positions=LearnedPositions(length=32768)),
        dtype="bf16",
        tokens=tuple(range(4096, 32769, 4096)),
        read_tokens=2048,
        budget_bytes=4 * GIB,
        budget_context=1024,
    ),
    # Says whether the benchmark works, and nothing about memory.
    "tiny": Shape(
        spec=preset("tiny").with_changes(num_hidden_layers=2, positions=LearnedPositions(length=1024)),
        dtype="fp32",
        tokens=(256, 512, 1024),
        read_tokens=64,
        budget_bytes=64 * MIB,
        budget_context=256,
    ),
}


# In a process of its own


class Meter:
    """Bytes above those that were held when the meter was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = self._held()

    def _held(self) -> int:
        if self.device == "cpu":
            return resident_bytes()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def held(self) -> int:
        """Now."""
        return self._held() - self.start

    def peak(self) -> int:
        """The most there was so far."""
        return (peak_resident_bytes() if self.device == "cpu" else torch.cuda.max_memory_allocated()) - self.start


def filled_points(variant: Variant, shape: Shape, device: str) -> list[dict[str, int]]:
    """Measured at every length of the shape."""
    spec = variant.of(shape.spec)
    like = torch.empty(1, dtype=DTYPES[shape.dtype], device=device)
    fill(TiedCache(spec, variant.held), 64, like)  # what the first use of anything costs is no part of a cache
    meter, found = Meter(device), []
    cache = TiedCache(spec, variant.held)
    for tokens in shape.tokens:
        if device != "cpu" and not variant.bits:
            del cache
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            cache = TiedCache(spec, CacheSpec(max_tokens=tokens))
        fill(cache, tokens, like)
        counted = cache_bytes(spec, tokens, shape.dtype, cache=cache.cache_specs)
        if cache.nbytes != counted:
            raise RuntimeError(
                f"{variant.name}: {tokens} tokens occupy {cache.nbytes} bytes, and {counted} were counted"
            )
        found.append({"tokens": tokens, "held": meter.held(), "peak": meter.peak()})
    return found


def built(variant: Variant, shape: Shape, device: str) -> Any:
    """The model, ready to read."""
    return build_model(variant.of(shape.spec), seed=0).to(DTYPES[shape.dtype]).to(device).eval()


@torch.no_grad()
def read_points(variant: Variant, shape: Shape, device: str) -> list[dict[str, int]]:
    """Measured after the real model has read a text; it reads it twice, as the first time brings what stays whatever the cache."""
    model = built(variant, shape, device)
    text = torch.arange(shape.read_tokens, device=device)[None] % shape.spec.vocab_size
    for is_measured in (False, True):
        meter, cache = Meter(device), TiedCache(model.config.spec, variant.held)
        for part in text.split(256, dim=1):
            model(part, cache=cache, logits_to_keep=1)
        if not is_measured:
            del cache
    return [{"tokens": shape.read_tokens, "held": meter.held(), "peak": meter.peak()}]


def limit_memory(budget_bytes: int, device: str) -> None:
    """Refuse this process more than ``budget_bytes`` beyond what it has now."""
    if device == "cpu":
        limit = status_bytes("VmData") + budget_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + budget_bytes) / total)


@torch.no_grad()
def fits(model: Any, batch: int, context: int) -> bool:
    """Whether the cache of ``batch`` sequences and the token that completes ``context`` find room beside the weights."""
    weight = next(model.parameters())
    try:
        cache = TiedCache(model.config.spec, CacheSpec(max_tokens=context))
        like = torch.empty(batch, dtype=weight.dtype, device=weight.device)
        fill(cache, context - 1, like, chunk=128)
        model(torch.zeros((batch, 1), dtype=torch.long, device=weight.device), cache=cache)
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except RuntimeError as error:
        # The CPU's allocator has no error of its own.
        if "can't allocate memory" not in str(error):
            raise
        return False
    return True


def largest_batch(variant: Variant, shape: Shape, device: str) -> list[dict[str, int]]:
    """The most sequences of the budget's length that fit, found by bisection."""
    torch.zeros(1, device=device)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # threads have stacks, which are made before anything is counted
    limit_memory(shape.budget_bytes, device)
    model, context = built(variant, shape, device), shape.budget_context
    least, beyond = 0, 2 + shape.budget_bytes // cache_bytes(model.config.spec, context, shape.dtype)
    while beyond - least > 1:
        batch = (least + beyond) // 2
        least, beyond = (batch, beyond) if fits(model, batch, context) else (least, batch)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    return [{"tokens": least * context, "held": 0, "peak": 0}]


PARTS = {"filled": filled_points, "read": read_points, "budget": largest_batch}


# Over all processes


def measured(part: str, name: str, arguments: argparse.Namespace) -> list[dict[str, int]]:
    """What a fresh process finds."""
    given = ["--part", part, "--variant", name, "--shape", arguments.shape, "--device", arguments.device]
    return json.loads(output_of(__file__, *given).splitlines()[-1])


def slope(points: list[dict[str, int]], what: str) -> float:
    """Bytes per token: the straight line through the points with the least squares."""
    return float(np.polyfit([point["tokens"] for point in points], [point[what] for point in points], 1)[0])


def formula(variant: Variant, shape: Shape) -> float:
    """Bytes per token, counted."""
    spec = variant.of(shape.spec)
    counted = [cache_bytes(spec, tokens, shape.dtype, cache=variant.held) for tokens in shape.tokens]
    return (counted[-1] - counted[0]) / (shape.tokens[-1] - shape.tokens[0])


def growth_rows(points: dict[str, list[dict[str, int]]], shape: Shape, device: str) -> list[Row]:
    rows = []
    for name, own in points.items():
        counted = formula(VARIANTS[name], shape)
        off = abs(slope(own, "held") / counted - 1)
        rows.append(row(f"growth per token, off the formula, {name}", off, "ratio", "<= 0.05"))
        if device != "cpu" and not VARIANTS[name].bits:
            off = abs(slope(own, "peak") / counted - 1)
            rows.append(row(f"growth of the peak per token, off the formula, {name}", off, "ratio", "<= 0.05"))
    for after in ("", ", 8 bits", ", 4 bits"):
        share = slope(points[TWO + after], "held") / slope(points[THREE + after], "held")
        rows.append(row(f"growth per token, {TWO} / {THREE}{after}", share, "ratio", "<= 0.51"))
    return rows


def read_rows(shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    held = {name: measured("read", name, arguments)[0]["held"] for name in (THREE, TWO)}
    counted = {name: cache_bytes(VARIANTS[name].of(shape.spec), shape.read_tokens, shape.dtype) for name in held}
    text = f"a text of {shape.read_tokens:,} tokens, read by the model"
    rows = [
        row(f"{text}, off the formula, {name}", abs(held[name] / counted[name] - 1), "ratio", "<= 0.05")
        for name in held
    ]
    return [*rows, row(f"{text}, {TWO} / {THREE}", held[TWO] / held[THREE], "ratio", "<= 0.51")]


def budget_rows(shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    if arguments.device == "cpu" and not STATUS.exists():
        return []  # only Linux limits a process so
    fitting = {name: measured("budget", name, arguments)[0]["tokens"] for name in (THREE, TWO)}
    words = f"batch x context in {shape.budget_bytes / MIB:,.0f} MiB"
    rows = [row(f"{words}, {TWO} / {THREE}", fitting[TWO] / max(1, fitting[THREE]), "ratio", ">= 1.9")]
    return rows + [row(f"{words}, {name}", tokens, "tokens") for name, tokens in fitting.items()]


def all_rows(shape: Shape, arguments: argparse.Namespace) -> list[Row]:
    points = {name: measured("filled", name, arguments) for name in VARIANTS}
    rows = growth_rows(points, shape, arguments.device)
    rows += read_rows(shape, arguments) + budget_rows(shape, arguments)
    for name, own in points.items():
        rows.append(row(f"growth per token, {name}", slope(own, "held") / KIB, "KiB"))
        rows.append(row(f"growth per token, counted, {name}", formula(VARIANTS[name], shape) / KIB, "KiB"))
    for name, own in points.items():
        for point in own:
            rows.append(row(f"{point['tokens']:,} tokens, {name}", point["held"] / MIB, "MiB"))
            rows.append(row(f"{point['tokens']:,} tokens, peak, {name}", point["peak"] / MIB, "MiB"))
    return rows


def title(shape: str) -> str:
    """Of what the picture is."""
    return f"{shape}, {SHAPES[shape].dtype}"


def parsed(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="paper-300m", help="the model and the lengths")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write memory against tokens there, as SVG")
    parser.add_argument("--rows", type=Path, metavar="PATH", help="measure nothing: take the rows of an earlier --json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --device cpu")
    return arguments


def main(given: list[str] | None = None) -> None:
    arguments = parsed(given)
    shape = SHAPES[arguments.shape]
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](VARIANTS[arguments.variant], shape, arguments.device)))
        return
    rows = json.loads(arguments.rows.read_text()) if arguments.rows else all_rows(shape, arguments)
    if arguments.picture:
        arguments.picture.write_text(picture(rows, title(arguments.shape)), encoding="utf-8")
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
