"""The Triton kernels of prefill and training: what they refuse, that they compile for GPUs, and (in a process of its own) what they compute."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interpreter import IS_INTERPRETING, run_interpreted
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, Rotation, choose, triton_prefill, triton_prefill_launch
from twofold.kernels import triton as kernels_triton
from twofold.kernels.triton_prefill_plan import Plan, tiles_of

triton = pytest.importorskip("triton")
of_this_compiler = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="what is spilled is counted for the compiler of Triton 3.6"
)


@pytest.mark.timeout(900)
def test_what_it_computes():
    """By Triton's interpreter, and by the GPU where there is one."""
    run_interpreted("interpreted_prefill.py")
    if torch.cuda.is_available():
        run_interpreted("interpreted_prefill.py", interpret=False)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_it_computes_at_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "long")
    run_interpreted("interpreted_prefill.py", "-k", "truth", "--timeout", "3000")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_benchmark_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("train_gpu").main([])
    assert caught.value.code == 2
    assert "there is no GPU here" in capsys.readouterr().err


# What it refuses


def call(**changes: Any) -> Inputs:
    key = torch.zeros(2, 2, 64, 16, dtype=torch.bfloat16)
    query = torch.zeros(2, 4, 48, 16, dtype=torch.bfloat16)
    return replace(Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=1.0), **changes)


PROBLEM = replace(call().problem, device="cuda")


@pytest.fixture
def runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 that is not here."""
    monkeypatch.setattr(triton_prefill, "why_not", lambda _: "")
    monkeypatch.setattr(triton_prefill, "compute_capability", lambda: (9, 0))


@pytest.mark.usefixtures("runs_anywhere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64", "key_dtype": "float64"}, "one dtype of bfloat16, float16, float32"),
        ({"key_dtype": "int8"}, "one dtype of bfloat16, float16, float32"),
        ({"head_dim": 264}, "head_dim 16 to 256"),
        ({"head_dim": 8}, "head_dim 16 to 256"),
        ({"has_bias": True}, "does not know: a bias"),
        ({"key_extension_dim": 8}, "a key that all heads share"),
        ({"has_pages": True, "has_lengths": True}, "pages, lengths"),
        ({"has_scales": True}, "scales of keys"),
        ({"has_positions": True}, "positions"),
        ({"soft_cap": 3.0}, "a soft cap"),
        ({"has_sinks": True}, "sinks"),
        ({"num_queries": 65}, "its queries are the last of the text"),
    ],
)
def test_it_says_why_it_does_not_serve(changes: dict[str, Any], reason: str):
    assert not triton_prefill.supports(PROBLEM)
    assert reason in triton_prefill.supports(replace(PROBLEM, **changes))


@pytest.mark.usefixtures("runs_anywhere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shares_value": False}, "two tensors"),
        ({"dtype": "float32", "key_dtype": "float32"}, "float32 exactly"),
        ({"num_queries": 31}, "fewer than 32 queries"),
        ({}, "tuned for GPUs of compute capability 9"),
    ],
)
def test_auto_passes_over_it_where_it_does_not_pay(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
):
    assert choose(PROBLEM).name == "triton_prefill"
    problem = replace(PROBLEM, **changes)
    if not changes:
        monkeypatch.setattr(triton_prefill, "compute_capability", lambda: (8, 9))
    choice = choose(problem)
    assert choice.name == "sdpa"
    assert reason in choice.refused["triton_prefill"]
    assert choose(problem, "triton_prefill").name == "triton_prefill"
    with pytest.raises(TwofoldError, match="a bias"):
        choose(replace(problem, has_bias=True), "triton_prefill")


def test_of_several_gpus_each_has_its_own_tiles_and_refusals(monkeypatch: pytest.MonkeyPatch):
    """Whichever was asked about first."""
    capabilities, in_use = [(9, 0), (8, 6), (7, 5)], [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: in_use[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.version, "hip", None)
    kernels_triton.capability_of.cache_clear()
    try:
        assert [triton_prefill_launch._capability(torch.device("cuda", index)) for index in range(3)] == [9, 8, 7]
        assert not triton_prefill.supports(PROBLEM)
        assert not triton_prefill.pays(PROBLEM)
        in_use[0] = 1
        assert not triton_prefill.supports(PROBLEM)
        assert "capability 9" in triton_prefill.pays(PROBLEM)
        in_use[0] = 2
        assert triton_prefill.supports(PROBLEM) == "the GPU's compute capability is 7.5, and 8.0 is the least"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert "AMD" in triton_prefill.supports(PROBLEM)
    finally:
        kernels_triton.capability_of.cache_clear()


@pytest.mark.skipif(IS_INTERPRETING, reason="the interpreter runs on a CPU")
def test_a_cpu_is_no_gpu():
    problem = call().problem
    assert triton_prefill.supports(problem) == "it runs on a GPU"
    assert "triton_prefill" not in choose(problem).name
    with pytest.raises(TwofoldError, match="it runs on a GPU"):
        choose(problem, "triton_prefill")
    with pytest.raises(TwofoldError, match="it runs on a GPU"):
        triton_prefill.attend(call())


def rotation(rows: int = 64, pairs: int = 8, distance: int = 8) -> Rotation:
    return Rotation(cosine=torch.zeros(rows, pairs), sine=torch.zeros(rows, pairs), distance=distance)


def learned_rotation() -> Rotation:
    return Rotation(cosine=torch.zeros(64, 8, requires_grad=True), sine=torch.zeros(64, 8), distance=8)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.usefixtures("runs_anywhere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"soft_cap": 3.0}, "cannot serve this: it does not know: a soft cap"),
        ({"query": zeros(2, 4, 16)}, "queries and keys of 4 dimensions, and got 3 and 4"),
        ({"query": zeros(2, 3, 48, 16)}, "Keys (2, 2, 64, 16) do not fit queries (2, 3, 48, 16)"),
        ({"query": zeros(3, 4, 48, 16)}, "batch and head_dim must be equal"),
        ({"query": zeros(2, 4, 48, 24)}, "batch and head_dim must be equal"),
        ({"query": zeros(2, 4, 65, 16)}, "its queries are the last of the text"),
        ({"query": zeros(2, 4, 48, 16, dtype=torch.float16)}, "are float16, bfloat16: triton_prefill wants one"),
        ({"value": zeros(2, 2, 64, 24)}, "Values (2, 2, 64, 24) do not fit keys (2, 2, 64, 16)"),
        ({"key_scale": zeros(15)}, "key_scale has the shape (15,), but must be (16,)"),
        ({"key_rotation": rotation(63)}, "(1, 63) and (1, 63) rows, but there are 64 keys"),
        ({"key_rotation": rotation(64, 8, 9)}, "8 pairs at a distance of 9 do not fit into a head of 16"),
        ({"key_rotation": rotation(64, 8, 7)}, "use n <= distance <= head_dim - n"),
        ({"key_rotation": learned_rotation()}, "Cosines and sines have no gradient here"),
        ({"mask": Mask(causal=True, key_mask=zeros(2, 63, dtype=torch.bool))}, "key_mask has the shape (2, 63)"),
        ({"mask": Mask(causal=True, key_mask=zeros(2, 64))}, "key_mask is torch.bfloat16, but must be bool"),
        ({"mask": Mask(causal=True, segments=zeros(1, 64, dtype=torch.int64))}, "segments has the shape (1, 64)"),
        ({"mask": Mask(causal=True, segments=zeros(2, 64))}, "segments are torch.bfloat16, but must be int32 or int64"),
        ({"key_scale": zeros(16, device="meta")}, "tensors on cpu, meta: put all of them on one device"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_sentence(changes: dict[str, Any], reason: str):
    with pytest.raises(TwofoldError) as caught:
        triton_prefill.attend(call(**changes))
    assert reason in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_tiles_for_every_head():
    """No head is without tiles, and tiles of queries end where the rows do that are prepared for them."""
    for head_dim in range(16, 257):
        plan = Plan(
            head_dim=head_dim, causal=False, window=False, key_mask=False, segments=False,
            shares=True, scales=False, pairs=0, distance=0,
        )  # fmt: skip
        assert head_dim <= plan.columns < 2 * head_dim or plan.columns == 16
        for role in ("forward", "query_gradient", "stream_gradient"):
            for itemsize, capability in ((2, 8), (2, 9), (2, 12), (4, 9)):
                tiles = tiles_of(role, plan, itemsize=itemsize, capability=capability)
                assert triton_prefill_launch.PREPARED_ROWS % tiles.queries == 0
                assert plan.with_tiles(tiles, 3 * tiles.queries).masked_late is False
                assert plan.with_tiles(tiles, 3 * tiles.queries + 1).masked_late is True


# That it compiles

SHARED_BYTES = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
"""What the smallest GPU of a compute capability (8.6 and 8.9 of 8.0) gives a program."""


class Target:
    """A GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def output_of(*command: object) -> str:
    """All that a tool says."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


class Compiled:
    """What became of a kernel: registers of a thread, bytes of them that found no room, bytes of shared memory, and how products are made.

    ``in_turn``: products of groups of warps wait for each other, which ptxas says where it sees no way to let them overlap.
    """

    def __init__(self, kernel: Any, folder: Path, capability: int) -> None:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        code, file = folder / "kernel.ptx", folder / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        found = re.search(r"REG:(\d+) STACK:(\d+)", output_of(tools / "cuobjdump", "-res-usage", file))
        assert found is not None
        self.registers, self.spilled = map(int, found.groups())
        code.write_text(kernel.asm["ptx"])
        said = output_of(tools / "ptxas", "-v", "--gpu-name=sm_90a", code, "-o", file) if capability == 90 else ""
        self.capability = kernel.metadata.target.arch
        self.in_turn = "wgmma.mma_async instructions are serialized" in said
        self.shared, self.warps = kernel.metadata.shared, kernel.metadata.num_warps
        code = kernel.asm["ttgir"]
        self.copies, self.group_products = code.count("async_copy_global_to_local"), code.count("warp_group_dot ")
        self.products = self.group_products + code.count("tt.dot ")

    @property
    def programs(self) -> int:
        """How many a multiprocessor of an H100 holds."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min((SHARED_BYTES[90] + 1024) // (self.shared + 1024), 65536 // registers)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Compiled]]:
    """The kernels of the last call, by name, which were compiled for an H100 and not started."""
    found: dict[str, Compiled] = {}

    def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, **options: int) -> None:
        made = kernel.warmup(*arguments, grid=grid, **options)
        found[kernel.fn.__name__] = Compiled(made, tmp_path, triton.runtime.driver.active.capability)

    monkeypatch.setattr(triton_prefill_launch, "launch", launch)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Target(90))
    forget_gpus()
    yield found
    triton.runtime.driver._active = active


def forget_gpus() -> None:
    """Kernels compile for the GPU that they saw first, and what is not here may become another."""
    from twofold.kernels.triton import prefill, prefill_backward

    for kernel in (*vars(prefill).values(), *vars(prefill_backward).values()):
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "ragged": {"num_queries": 1000},
    "window": {"window_tokens": 500},
    "window both ways": {"window_tokens": 500, "causal": False},
    "documents": {"segments": True},
    "padding": {"key_mask": True},
    "two tensors": {"shares": False},
    "full rotation": {"pairs": 0.5},
    "partial rotation": {"pairs": 0.125},
    "rotation of the first dimensions": {"pairs": 0.125, "distance": 0.125},
    "scaled keys": {"scales": True},
    "everything": {
        "window_tokens": 500, "segments": True, "key_mask": True, "shares": False, "pairs": 0.125, "scales": True
    },
    "one query": {"num_queries": 1, "num_keys": 1, "group": 1},
}  # fmt: skip


def compile_call(head_dim: int, dtype: torch.dtype, **kind: Any) -> None:
    """Both passes of a call of some kind; its numbers are not looked at."""
    num_queries, num_keys = kind.get("num_queries", 1024), kind.get("num_keys", 1024)
    key = torch.zeros(2, 1, num_keys, head_dim, dtype=dtype)
    query = torch.zeros(2, kind.get("group", 2), num_queries, head_dim, dtype=dtype)
    pairs = int(head_dim * kind.get("pairs", 0))
    table = torch.zeros(1, num_keys, pairs, dtype=dtype) if pairs else None
    streams = triton_prefill_launch.Streams(
        query=query,
        key=key,
        value=None if kind.get("shares", True) else torch.zeros_like(key),
        key_scale=torch.zeros(head_dim, dtype=dtype) if kind.get("scales") else None,
        cosine=table,
        sine=table,
        key_mask=torch.ones(2, num_keys, dtype=torch.bool) if kind.get("key_mask") else None,
        segments=torch.zeros(2, num_keys, dtype=torch.int64) if kind.get("segments") else None,
    )
    settings = triton_prefill_launch.Settings(
        scale=0.1,
        causal=kind.get("causal", True),
        window_tokens=kind.get("window_tokens", 0),
        distance=int(head_dim * kind.get("distance", 0.5)),
    )
    output, logarithm = triton_prefill_launch.run_forward(streams, settings)
    triton_prefill_launch.run_backward(streams, settings, (output, output, logarithm), wants=(True, True))


needs_compiler = pytest.mark.skipif(IS_INTERPRETING, reason="what is interpreted is not compiled")


@needs_compiler
@of_this_compiler
def test_heads_of_64_leave_room_for_several_programs(compiled: dict[str, Compiled]):
    """While one multiplies, the other takes exponentials. All products are those of groups of warps, and of a stream no tile is loaded twice."""
    compile_call(64, torch.bfloat16)
    for name, programs in (("forward", 2), ("query_gradient", 3), ("stream_gradient", 2)):
        kernel = compiled[name]
        assert kernel.programs == programs
        assert kernel.spilled <= 48
        assert kernel.group_products == kernel.products > 0
        assert not kernel.in_turn
    # A tile of keys, before the loop and in it, in the loop without a mask and in that with one; of queries as many, with gradients, levels and deltas.
    assert compiled["forward"].copies == 3 * 2
    assert compiled["stream_gradient"].copies == 4 * 2 * 2


@of_this_compiler
@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "full rotation"])
def test_heads_of_128_fit(kind: str, compiled: dict[str, Compiled]):
    compile_call(128, torch.bfloat16, **KINDS[kind])
    for name, max_spilled in (
        ("forward", 0),
        ("query_gradient", 0),
        ("stream_gradient", 16 if kind == "plain" else 360),
    ):
        assert compiled[name].programs == 1
        assert compiled[name].spilled <= max_spilled
        assert compiled[name].group_products == compiled[name].products > 0
        assert not compiled[name].in_turn


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_compiles(head_dim: int, kind: str, dtype: torch.dtype, compiled: dict[str, Compiled]):
    compile_call(head_dim, dtype, **KINDS[kind])
    for kernel in compiled.values():
        assert kernel.shared <= SHARED_BYTES[90]
        # Heads of 80 mask what lies beside them, which takes registers too.
        assert kernel.spilled <= (400 if head_dim < 256 and kind != "everything" else 1000)
        assert not kernel.in_turn


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "full rotation", "everything"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32_compiles(head_dim: int, kind: str, compiled: dict[str, Compiled]):
    compile_call(head_dim, torch.float32, **KINDS[kind])
    assert all(kernel.shared <= SHARED_BYTES[90] for kernel in compiled.values())


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "full rotation", "partial rotation", "two tensors", "everything"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capability", [80, 100, 120])
def test_other_gpus_have_smaller_tiles(
    capability: int, head_dim: int, kind: str, compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(triton_prefill_launch, "_capability", lambda _: capability // 10)
    triton.runtime.driver.set_active(Target(capability))
    forget_gpus()
    compile_call(head_dim, torch.bfloat16, **KINDS[kind])
    for kernel in compiled.values():
        assert kernel.capability == capability
        assert kernel.shared <= SHARED_BYTES[capability]
        assert kernel.spilled <= 640
