"""Decoding attention on a GPU, few queries over many keys: the Triton kernel with one tensor, against the speed of memory and all that PyTorch has.

    python benchmarks/decode_gpu.py                              # a table
    python benchmarks/decode_gpu.py --json > docs/results/decode_gpu.json
    python benchmarks/decode_gpu.py --shapes 4x4x8x512x16384     # sequences x KV heads x queries of each x head_dim x tokens
    python benchmarks/decode_gpu.py --leave-out flex models      # what takes minutes to compile, and whole models

In the same run a plain Triton kernel reads the one tensor and does nothing else: that is the limit. "One tensor" is key and value at once, in bfloat16; "two tensors"
are read by the same code; keys are turned as they are read in all dimensions or in a quarter of them, by steady tables or by a row for each key; codes
are int8 and float8 with a scale for each token. Of PyTorch there are all fused calls, with the queries of a group folded together and with enable_gqa,
flex_attention compiled, and plain products of matrices, all with two tensors and with v = k.

Every result is compared with float64 before anything is timed. Each contender is one CUDA graph, so that no processor's time is measured; before each
replay other memory is read until the GPU's cache holds nothing else (and nothing that is still to be written). In each round all contenders run in turn; a
ratio is the median over rounds of the ratio within a round. Where time is short: `timeout 500 python benchmarks/decode_gpu.py` shows what it had until then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from decode_cpu import PAGES, Shape, check, paged, quantized, rotation
from decode_gpu_models import model_rows
from rows import Row, in_turn, left_out, ratio, row, shown
from twofold.kernels import Inputs, Mask, Rotation, triton_decode
from twofold.kernels.triton import is_interpreting, multiprocessors

Contenders = dict[str, Callable[[], Tensor]]
SHAPES = (
    "16x16x1x64x8192",
    "16x8x4x128x8192",
    "1x8x4x128x131072",
    "4x4x8x512x16384",
    "1x4x8x512x65536",
    "8x1x16x512x32768",
    "8x4x8x256x16384",
    "1x8x4x128x4096",
    "32x8x4x128x1024",
)
TINY = ("1x2x2x64x70", "1x1x1x512x40")
FUSED = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLUSHED_BYTES = 512 << 20
"""Several times what any GPU's cache holds."""
LARGE_BYTES = 128 << 20
"""From so many bytes in the one tensor on, the limit is that of memory."""


@dataclass(frozen=True)
class Bench:
    """Where and how often: a GPU, or for a self-check Triton's interpreter on a CPU."""

    device: str
    rounds: int
    leave_out: frozenset[str]

    @property
    def is_real(self) -> bool:
        """Whether times mean anything."""
        return self.device == "cuda"


# What is timed


def on(device: str, inputs: Rotation) -> Rotation:
    """Tables of angles on a device."""
    assert inputs.steady is not None
    cosine, sine = inputs.steady
    steady = cosine.to(device), sine.to(device)
    return replace(inputs, cosine=inputs.cosine.to(device), sine=inputs.sine.to(device), steady=steady)


def ours(shape: Shape, device: str) -> dict[str, Inputs]:
    """What the kernel is given, by name."""
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    draw = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=device, generator=draw)

    heads = shape.kv_heads * shape.group
    stream, query = normal(*size), normal(shape.batch, heads, 1, shape.head_dim)
    one = Inputs(query=query, key=stream, value=stream, mask=Mask(causal=True), scale=shape.head_dim**-0.5)
    given = {"one tensor": one, "two tensors": replace(one, value=normal(*size))}
    for name, pairs in (("turned", shape.head_dim // 2), ("turned in part", shape.head_dim // 8)):
        turning = on(device, rotation(shape, pairs))
        given[name] = replace(one, key_rotation=turning)
        given[f"{name}, a row for each key"] = replace(one, key_rotation=replace(turning, steady=None))
    for name, dtype in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        codes, scales = quantized(stream, 3)
        codes = codes if dtype == torch.int8 else (stream / scales).to(dtype)
        given[name] = replace(one, key=codes, value=codes, key_scales=scales, value_scales=scales)
        if name == "int8":
            turning = given["turned in part"].key_rotation
            given["int8, turned in part"] = replace(given[name], key_rotation=turning)
    given["four queries"] = replace(one, query=normal(shape.batch, heads, 4, shape.head_dim))
    return given


def of_pytorch(query: Tensor, key: Tensor, value: Tensor, bench: Bench) -> Contenders:
    """PyTorch's ways to the same; ``query`` [B, H, 1, D] is folded to [B, G, H / G, D], which repeats no key."""
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    scale = query.shape[3] ** -0.5

    def fused(backend: SDPBackend, queries: Tensor, enable_gqa: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(queries, key, value, scale=scale, enable_gqa=enable_gqa)

        return run

    made: Contenders = {
        "products": lambda: torch.softmax((scale * folded) @ key.transpose(-1, -2), dim=-1) @ value,
        "products, keys first": lambda: (
            torch.softmax((key @ (scale * folded).transpose(-1, -2)).transpose(-1, -2), dim=-1) @ value
        ),
    }
    backends = FUSED if bench.is_real else {"math": SDPBackend.MATH}
    for name, backend in backends.items():
        made[name] = fused(backend, folded, False)
        if query.shape[1] != key.shape[1]:
            made[f"{name}, enable_gqa"] = fused(backend, query, True)
    if "flex" not in bench.leave_out:
        made["flex"] = flexible(query, key, value, scale)
    return made


def flexible(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    """flex_attention, compiled for these shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def contenders(shape: Shape, bench: Bench) -> Contenders:
    """All of them by name, checked. What PyTorch does not have for a shape is said and left out."""
    from reading_gpu import read

    torch.compiler.reset()  # what flex_attention was compiled to for other shapes counts against a limit
    made: Contenders = {}
    given = ours(shape, bench.device)
    for name, inputs in given.items():
        check(inputs, triton_decode.attend(inputs), name)
        made[name] = lambda inputs=inputs: triton_decode.attend(inputs)
    one, in_pages = given["one tensor"], paged(given["one tensor"])
    check(one, triton_decode.attend(in_pages), PAGES)
    made[PAGES] = lambda: triton_decode.attend(in_pages)
    for tensors, value in (("two", given["two tensors"].value), ("one", one.key)):
        inputs = replace(one, value=value)
        for name, run in of_pytorch(one.query, one.key, value, bench).items():
            try:
                check(inputs, run(), f"PyTorch, {name}")
            except (Exception, SystemExit) as error:  # noqa: BLE001 (libraries raise what they like for a shape that they do not know)
                left_out(f"{shape}, {name}", error)
            else:
                made[f"PyTorch, {tensors}: {name}"] = run
    count = multiprocessors(torch.device(bench.device))
    made["memory"] = lambda: read(one.key, count)
    return made


# How it is timed


def graphs_of(made: Contenders) -> dict[str, Callable[[], object]]:
    """All as CUDA graphs. One of PyTorch's that cannot be captured is said and left out."""
    graphs = {}
    for name, run in made.items():
        try:
            graphs[name] = captured(run)
        except RuntimeError as error:
            if not name.startswith("PyTorch"):
                raise
            left_out(name, error)
    return graphs


def captured(run: Callable[[], Tensor]) -> Callable[[], object]:
    """As one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(made: Contenders, bench: Bench) -> dict[str, list[float]]:
    """Seconds of each in each round."""
    from reading_gpu import read

    if not bench.is_real:
        return {name: [seconds_of(run) for _ in range(bench.rounds)] for name, run in made.items()}
    others = torch.zeros(FLUSHED_BYTES, dtype=torch.int8, device=bench.device)
    count = multiprocessors(others.device)
    graphs = graphs_of(made)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
    for index in range(bench.rounds + 3):
        for name in in_turn(list(graphs), index):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            read(others, count)
            start.record()
            graphs[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs[3:]] for name, pairs in events.items()}


def seconds_of(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def started(made: Contenders, bench: Bench) -> dict[str, float]:
    """Seconds that the processor takes to start each, which a CUDA graph takes but once; nobody waits for the GPU."""
    seconds = {}
    for name, run in made.items():
        times = [seconds_of(run) for _ in range(5 if bench.is_real else 1)]
        seconds[name] = median(times)
        if bench.is_real:
            torch.cuda.synchronize()
    return seconds


# What is said


def best(seconds: dict[str, list[float]], prefix: str, names: tuple[str, ...] = ()) -> list[float]:
    """The fastest of PyTorch's, of those that begin with any of ``names`` if these are given."""
    found = {
        name: median(times)
        for name, times in seconds.items()
        if name.startswith(prefix) and (not names or name.removeprefix(prefix).startswith(names))
    }
    return seconds[min(found, key=found.__getitem__)] if found else []


def rows_of(shape: Shape, seconds: dict[str, list[float]], starts: dict[str, float]) -> Iterator[Row]:
    """Ratios with their goals, and what they are ratios of."""
    one, stream_bytes = seconds["one tensor"], 2 * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim
    is_large = stream_bytes >= LARGE_BYTES
    two, same = best(seconds, "PyTorch, two: "), best(seconds, "PyTorch, one: ")
    yield row(f"{shape}: bandwidth of memory", stream_bytes / median(seconds["memory"]) / 1e9, "GB/s")
    share = ratio(seconds["memory"], one)
    yield row(f"{shape}: one tensor, share of the bandwidth", share, "ratio", ">= 0.85" if is_large else None)
    goal = "<= 0.55" if is_large else None
    yield row(f"{shape}: one tensor / PyTorch's best with two tensors", ratio(one, two), "ratio", goal)
    yield row(f"{shape}: one tensor / PyTorch's best with v = k", ratio(one, same), "ratio", "<= 1.0")
    yield row(f"{shape}: one tensor / two tensors", ratio(one, seconds["two tensors"]), "ratio")
    for name, limit in (("turned in part", "<= 1.05"), ("turned", "<= 1.12")):
        goal = limit if is_large and (name != "turned" or shape.head_dim <= 128) else None
        yield row(f"{shape}: {name} / one tensor", ratio(seconds[name], one), "ratio", goal)
        each = f"{name}, a row for each key"
        yield row(f"{shape}: {each} / one tensor", ratio(seconds[each], one), "ratio")
    if shape.head_dim == 512:
        partly, goals = seconds["turned in part"], ("<= 0.46", ">= 11") if is_large else (None, None)
        plain = best(seconds, "PyTorch, two: ", ("products",))
        yield row(f"{shape}: turned in part / plain products of two tensors", ratio(partly, plain), "ratio", goals[0])
        if fused := best(seconds, "PyTorch, two: ", tuple(FUSED)):
            yield row(f"{shape}: PyTorch's best fused call / turned in part", ratio(fused, partly), "ratio", goals[1])
    for name in ("int8", "float8", "int8, turned in part", PAGES, "four queries"):
        yield row(f"{shape}: {name} / one tensor", ratio(seconds[name], one), "ratio")
    for name, times in seconds.items():
        yield row(f"{shape}: {name}", 1e3 * median(times), "ms")
    of_pytorch = min(starts[name] for name in starts if name.startswith("PyTorch, one: "))
    for name, value in (("one tensor", starts["one tensor"]), ("PyTorch's quickest with v = k", of_pytorch)):
        yield row(f"{shape}: time to start a call, {name}", 1e3 * value, "ms")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows for programs")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="instead of those that goals are for")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--leave-out", nargs="+", choices=["flex", "models"], default=[], help="what takes longest")
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="tiny shapes on a CPU by Triton's interpreter, as tests run it: whether it works, and nothing about speed",
    )
    options = parser.parse_args(given)
    if options.self_check and not is_interpreting():
        parser.error("Triton's interpreter is off: set TRITON_INTERPRET=1 before Python starts")
    if not options.self_check and not torch.cuda.is_available():
        parser.error("there is no GPU here, and decoding on one is what is measured")
    device = "cpu" if options.self_check else "cuda"
    leave_out = frozenset({*options.leave_out, *(["flex"] if options.self_check else [])})
    bench = Bench(device, 1 if options.self_check else options.rounds, leave_out)
    shapes = options.shapes or [Shape.parse(text) for text in (TINY if options.self_check else SHAPES)]
    with shown(as_json=options.json) as rows:
        with torch.inference_mode():
            for shape in shapes:
                start = time.perf_counter()
                made = contenders(shape, bench)
                rows += rows_of(shape, timed(made, bench), started(made, bench))
                del made
                print(f"{shape} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if "models" not in bench.leave_out:
            rows.extend(model_rows(device, is_tiny=options.self_check))


if __name__ == "__main__":
    main()
