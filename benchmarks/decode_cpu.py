"""Decoding attention on a CPU, one query a head over many keys: the compiled kernel with one tensor, against the speed of memory and PyTorch's calls.

    python benchmarks/decode_cpu.py                              # a table
    python benchmarks/decode_cpu.py --json                       # rows for programs
    python benchmarks/decode_cpu.py --shapes 1x8x4x128x32768     # sequences x KV heads x queries of each x head_dim x tokens
    python benchmarks/decode_cpu.py --threads 1 --rounds 15
    python benchmarks/decode_cpu.py --llama-python ENVIRONMENT/bin/python    # llama.cpp beside it, from an environment that has llama-cpp-python and gguf

All of them read memory, not the cache of a processor: before each so much else is read that nothing of it is left there, as a model reads its weights and the
caches of all other layers before it comes back to one. Their programs are in the cache, as those of a model are that calls them for every layer: each is called
for a short text first. The speed at which this machine reads memory is measured likewise, over the one tensor. "One tensor" is key
and value at once in bfloat16; "two tensors" are read by the same code; codes are int8 with a scale for each token or each channel; keys are turned as they are read
in all dimensions, or in a quarter of them; pages are of 16 tokens of all heads, anywhere in memory. Of PyTorch there are `scaled_dot_product_attention` with the
queries of a group folded together, and with enable_gqa, and plain products of matrices in two layouts; "best" is the fastest of those but for enable_gqa, which is
shown by itself.

Every result is compared with float64 before anything is timed. In each round all contenders run in turn; a ratio is the median over rounds of the ratio within a
round. Two quiet cores take some minutes, and 6 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from rows import Row, in_turn, ratio, row, show
from twofold.kernels import Inputs, Mask, Rotation, native, reference

Contenders = dict[str, Callable[[], object]]
PAGES = "pages of 16"
SLOW = "enable_gqa"
SLOW_ROUNDS = 1
"""Rounds of the slowest contender, which is tens of times slower than all others."""
LLAMA_TOKENS = 4096
PIECES = 1024
"""Of each tensor, which are written in turns."""
SHORT = 256
"""Tokens of the text whose attention brings a program into the cache; they are enough for two threads."""


@dataclass(frozen=True)
class Shape:
    """Sequences, KV heads, queries that read one, their dimensions, and cached tokens."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of ``1x8x4x128x32768``. Raises ArgumentTypeError for anything else."""
        try:
            sizes = [int(part) for part in text.split("x")]
            shape = cls(*sizes)
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape: write sequences x KV heads x queries of each x head_dim x tokens, such as 1x8x4x128x32768"
            ) from None
        if min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: all five sizes must be at least 1")
        return shape

    def __str__(self) -> str:
        return f"{self.batch} x {self.kv_heads} x {self.group} x {self.head_dim}, {self.tokens:,} tokens"


SHAPES = ("1x8x4x128x32768", "8x8x4x128x32768", "1x16x1x64x32768", "1x4x8x512x16384")


def quantized(stream: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of eight bits, and what they are multiplied by: the largest of a token (``dim`` 3) or of a channel (``dim`` 2) over 127."""
    scales = stream.float().abs().amax(dim=dim, keepdim=True).clamp(min=1e-6) / 127
    return (stream.float() / scales).round().to(torch.int8), scales


def rotation(shape: Shape, pairs: int) -> Rotation:
    """Of successive positions, as our own models have it: in bfloat16, and in float32 for kernels that read a row of each block."""
    angles = torch.outer(torch.arange(shape.tokens).double(), 10000.0 ** -torch.linspace(0, 1, pairs).double())
    steady = (angles.cos().float(), angles.sin().float())
    cosine, sine = (table.bfloat16() for table in steady)
    return Rotation(cosine=cosine, sine=sine, distance=shape.head_dim // 2, steady=steady)


def side_by_side(*tensors: Tensor) -> list[Tensor]:
    """Copies, written a piece of each in turns, so that each gets its share of memory: a page is found for it when it is first written.

    Where others use the machine too, some of its memory is read faster than other, and tensors that lie apart would be compared with their luck.
    """
    copies = [torch.empty_like(tensor) for tensor in tensors]
    pairs = [
        zip(copy.flatten().chunk(PIECES), tensor.flatten().chunk(PIECES), strict=True)
        for copy, tensor in zip(copies, tensors, strict=True)
    ]
    for pieces in zip(*pairs, strict=True):
        for copy, piece in pieces:
            copy.copy_(piece)
    return copies


def ours(shape: Shape) -> dict[str, Inputs]:
    """What the compiled kernel is given."""
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    stream = torch.randn(size).bfloat16()
    coded = {name: quantized(stream, dim) for name, dim in (("tokens", 3), ("channels", 2))}
    stream, value, *codes = side_by_side(stream, torch.randn(size).bfloat16(), *(codes for codes, _ in coded.values()))
    query = torch.randn(shape.batch, shape.kv_heads * shape.group, 1, shape.head_dim).bfloat16()
    one = Inputs(query=query, key=stream, value=stream, mask=Mask(causal=True), scale=shape.head_dim**-0.5)
    given = {
        "one tensor": one,
        "two tensors": replace(one, value=value),
        "turned": replace(one, key_rotation=rotation(shape, shape.head_dim // 2)),
        "turned in part": replace(one, key_rotation=rotation(shape, shape.head_dim // 8)),
    }
    for (name, (_, scales)), key in zip(coded.items(), codes, strict=True):
        given[f"int8, scales of {name}"] = replace(one, key=key, value=key, key_scales=scales, value_scales=scales)
    return given


def paged(inputs: Inputs, page: int = 16) -> Inputs:
    """The same in pages that lie in any order, as vLLM lays them out: [pages, tokens, heads, dims]."""
    batch, kv_heads, tokens, head_dim = inputs.key.shape
    count = -(-tokens // page)
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(0)).to(inputs.key.device)
    rows = F.pad(inputs.key, (0, 0, 0, count * page - tokens)).transpose(1, 2)
    pages = torch.empty((batch * count, page, kv_heads, head_dim), dtype=rows.dtype, device=rows.device)
    pages[order] = rows.reshape(batch * count, page, kv_heads, head_dim)
    stream, table = pages.transpose(1, 2), order.reshape(batch, count).to(torch.int32)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=rows.device)
    return replace(inputs, key=stream, value=stream, pages=table, mask=Mask(causal=True, lengths=lengths))


def of_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Contenders:
    """PyTorch's ways to the same, without a copy of a key; ``query`` [B, H, 1, D] is folded to [B, G, H / G, D]."""
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    scale = query.shape[3] ** -0.5
    return {
        "folded": lambda: F.scaled_dot_product_attention(folded, key, value, scale=scale),
        "products": lambda: torch.softmax((scale * folded) @ key.transpose(-1, -2), dim=-1) @ value,
        "products, keys first": lambda: (
            torch.softmax((key @ (scale * folded).transpose(-1, -2)).transpose(-1, -2), dim=-1) @ value
        ),
        SLOW: lambda: F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True),
    }


def check(inputs: Inputs, found: Tensor, name: str) -> None:
    """Raise SystemExit where a result of the first sequence is no rounding of the one in float64."""
    first = replace(inputs, query=inputs.query[:1].double(), key=inputs.key[:1], value=inputs.value[:1])
    if inputs.key is inputs.value:
        first = replace(first, value=first.key)
    scales = None if inputs.key_scales is None else inputs.key_scales[:1]
    first = replace(first, key_scales=scales, value_scales=scales)
    if inputs.key_rotation is not None and inputs.key_rotation.steady is not None:
        cosine, sine = (table.double() for table in inputs.key_rotation.steady)
        first = replace(first, key_rotation=replace(inputs.key_rotation, cosine=cosine, sine=sine, steady=None))
    wanted = reference.attend(first)
    error = float((found[:1].reshape(wanted.shape).double() - wanted).abs().max() / wanted.abs().max())
    if not error < 0.03:
        raise SystemExit(f"{name} is wrong: it differs from float64 by {error:.1%} of the largest number.")


def contenders(shape: Shape) -> Contenders:
    """All of them by name, checked."""
    made: Contenders = {}
    given = ours(shape)
    for name, inputs in given.items():
        check(inputs, native.attend(inputs), name)
        made[name] = lambda inputs=inputs: native.attend(inputs)
    in_pages = paged(given["one tensor"])
    check(given["one tensor"], native.attend(in_pages), PAGES)
    made[PAGES] = lambda: native.attend(in_pages)
    for tensors in ("one", "two"):
        inputs = given[f"{tensors} tensor{'s' if tensors == 'two' else ''}"]
        for name, run in of_pytorch(inputs.query, inputs.key, inputs.value).items():
            if name == SLOW and (tensors == "one" or shape.batch > 1):
                continue
            check(inputs, run(), f"PyTorch, {name}")  # type: ignore[arg-type]
            made[f"PyTorch, {tensors}: {name}"] = run
    stream = given["one tensor"].key
    made["memory"] = lambda: native.read(stream)
    return made


def cache_bytes() -> int:
    """Of the largest cache of this processor, as Linux tells it; elsewhere 64 MiB are assumed."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=64 << 20)


def timed(made: Contenders, short: Contenders, rounds: int, others_bytes: int) -> dict[str, list[float]]:
    """Seconds of each in each round; those of the slow one in the first rounds only.

    Before each, so many bytes of something else are read, and then its like in ``short`` is called.
    """
    others = torch.ones(others_bytes // 8, dtype=torch.int64)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for index in range(rounds + 1):
        for name in in_turn(list(made), index):
            if name.endswith(SLOW) and index > SLOW_ROUNDS:
                continue
            native.read(others)
            short[name]()
            start = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def rows_of(shape: Shape, threads: int, seconds: dict[str, list[float]], stream_bytes: int) -> list[Row]:
    """Ratios with their goals, and what they are ratios of."""
    place = f"{shape}, {threads} thread{'s' if threads > 1 else ''}"
    one = seconds["one tensor"]

    def best(tensors: str) -> list[float]:
        names = [name for name in seconds if name.startswith(f"PyTorch, {tensors}:") and not name.endswith(SLOW)]
        return seconds[min(names, key=lambda name: median(seconds[name]))]

    rows = [
        row(f"{place}: bandwidth of memory", stream_bytes / median(seconds["memory"]) / 1e9, "GB/s"),
        row(f"{place}: one tensor", 1e3 * median(one), "ms"),
        row(f"{place}: one tensor, share of the bandwidth", ratio(seconds["memory"], one), "ratio", ">= 0.7"),
        row(f"{place}: PyTorch's best with two tensors / one tensor", ratio(best("two"), one), "ratio", ">= 4"),
        row(f"{place}: PyTorch's best with v = k / one tensor", ratio(best("one"), one), "ratio", ">= 3"),
        row(f"{place}: two tensors / one tensor", ratio(seconds["two tensors"], one), "ratio"),
        row(f"{place}: {PAGES} / one tensor", ratio(seconds[PAGES], one), "ratio"),
        row(f"{place}: turned / one tensor", ratio(seconds["turned"], one), "ratio", "<= 1.1"),
        row(f"{place}: turned in part / one tensor", ratio(seconds["turned in part"], one), "ratio", "<= 1.1"),
    ]
    rows += [
        row(f"{place}: one tensor / {name}", ratio(one, seconds[name]), "ratio", ">= 1.6")
        for name in ("int8, scales of tokens", "int8, scales of channels")
    ]
    if slow := seconds.get(f"PyTorch, two: {SLOW}"):
        few = one[: len(slow)]
        rows.append(row(f"{place}: PyTorch's {SLOW} / one tensor", ratio(slow, few), "ratio", ">= 20"))
    return rows


def beside_llama(shape: Shape, threads: int, python: str) -> list[Row]:
    """llama.cpp's attention over a cache that does not take it minutes to fill, in a process of its own, against ours over as many tokens.

    Both are repeated with nothing in between: as much of the keys as the caches of the processor hold is read from there.
    """
    shape = replace(shape, batch=1, tokens=min(shape.tokens, LLAMA_TOKENS))
    sizes = [str(size) for size in (shape.kv_heads, shape.group, shape.head_dim, shape.tokens)]
    script = Path(__file__).with_name("decode_llama.py")
    done = subprocess.run([python, str(script), *sizes, "--threads", str(threads)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SystemExit(f"{python} could not run llama.cpp: {reason}")
    made = {"one tensor": contenders(shape)["one tensor"]}
    one = timed(made, made, 15, others_bytes=0)["one tensor"]
    place = f"{shape}, {threads} thread{'s' if threads > 1 else ''}"
    return [
        row(
            f"{place}: llama.cpp, {kind} attention, two tensors / one tensor", milliseconds / 1e3 / median(one), "ratio"
        )
        for kind, milliseconds in json.loads(done.stdout).items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows for programs")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--llama-python", metavar="PATH", help="a Python that has llama-cpp-python and gguf, for the first shape"
    )
    options = parser.parse_args(arguments)
    if not native.levels():
        raise SystemExit("Nothing to measure: Twofold was installed without a compiler (see `twofold doctor`).")
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for shape in options.shapes:
            made, short = contenders(shape), contenders(replace(shape, tokens=min(shape.tokens, SHORT)))
            stream_bytes = 2 * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim
            for threads in options.threads:
                torch.set_num_threads(threads)
                print(f"{shape}, threads: {threads}", file=sys.stderr)
                rows += rows_of(shape, threads, timed(made, short, options.rounds, 2 * cache_bytes()), stream_bytes)
                if options.llama_python and shape == options.shapes[0]:
                    rows += beside_llama(shape, threads, options.llama_python)
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
