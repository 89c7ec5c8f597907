"""The Triton kernel of decoding: what it refuses, how it is shared out, that it compiles for an H100, and (in a process of its own) what it computes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interpreter import IS_INTERPRETING, run_interpreted
from twofold.errors import TwofoldError
from twofold.kernels import BACKENDS, Inputs, Mask, Rotation, choose, triton_decode
from twofold.kernels.triton import planned_bytes
from twofold.kernels.triton_decode_plan import SHARED_BYTES, Call, parts_of, plan_of, rows_of, tiles_of

triton = pytest.importorskip("triton")


@pytest.mark.timeout(900)
def test_what_it_computes():
    """By Triton's interpreter, and by the GPU where there is one."""
    run_interpreted("interpreted_decode.py")
    if torch.cuda.is_available():
        run_interpreted("interpreted_decode.py", interpret=False)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_it_computes_at_length():
    run_interpreted("interpreted_decode.py", "-m", "long", "--timeout", "3000")


def test_triton_is_imported_by_the_first_call_only():
    lines = [
        "import sys, torch, twofold",
        "from twofold.kernels import BACKENDS, Inputs, Mask, attend, choose",
        "key = torch.zeros(1, 1, 4, 16)",
        "inputs = Inputs(query=key[:, :, :1], key=key, value=key, mask=Mask(causal=True), scale=1.0)",
        "choose(inputs.problem), attend(inputs)",
        "sys.exit(', '.join({'triton', 'torch._dynamo'} & set(sys.modules)) or 0)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What it refuses


def call(**changes: Any) -> Inputs:
    key = torch.zeros(2, 2, 9, 16, dtype=torch.bfloat16)
    query = torch.zeros(2, 4, 1, 16, dtype=torch.bfloat16)
    return replace(Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=1.0), **changes)


PROBLEM = replace(call().problem, device="cuda")


@pytest.fixture
def runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "why_not", lambda _: "")


@pytest.mark.usefixtures("runs_anywhere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32", "key_dtype": "float32"}, "queries of float32"),
        ({"key_dtype": "float16"}, "queries of bfloat16 and keys of float16"),
        ({"needs_gradient": True}, "no gradient"),
        ({"has_segments": True}, "one document"),
        ({"num_queries": 17, "num_keys": 99}, "up to 16 queries"),
        ({"num_queries": 9}, "keys of before"),
        ({"head_dim": 576}, "up to 512 dimensions"),
        ({"key_extension_dim": 129}, "up to 128 dimensions"),
    ],
)
def test_it_says_why_it_does_not_serve(changes: dict[str, Any], reason: str):
    assert not triton_decode.supports(PROBLEM)
    assert choose(PROBLEM).name == "triton_decode"
    assert reason in triton_decode.supports(replace(PROBLEM, **changes))


def test_a_cpu_is_no_gpu():
    problem = call().problem
    if not IS_INTERPRETING:
        assert "a GPU" in triton_decode.supports(problem)
        assert choose(problem).name != "triton_decode"
        with pytest.raises(TwofoldError, match="it runs on a GPU"):
            BACKENDS["triton_decode"].attend(call())
    assert "not on meta" in triton_decode.supports(replace(problem, device="meta"))


def rotation(rows: int = 9, pairs: int = 8, distance: int = 8) -> Rotation:
    return Rotation(cosine=torch.zeros(rows, pairs), sine=torch.zeros(rows, pairs), distance=distance)


def steady(rows: int, pairs: int) -> Rotation:
    tables = torch.zeros(rows, pairs), torch.zeros(rows, pairs)
    return replace(rotation(), steady=tables)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.usefixtures("runs_anywhere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": torch.zeros(2, 4, 16)}, "query has the shape (2, 4, 16): it has four dimensions"),
        ({"query": torch.zeros(2, 3, 1, 16, dtype=torch.bfloat16)}, "3 query heads do not share 2 KV heads"),
        ({"query": torch.zeros(2, 4, 1, 18, dtype=torch.bfloat16)}, "(2, 4, 1, 16) is wanted"),
        ({"query": torch.zeros(2, 4, 1, 16, dtype=torch.float16)}, "queries of float16 and keys of bfloat16"),
        ({"query": torch.zeros(3, 4, 1, 16, dtype=torch.bfloat16)}, "key has the shape (2, 2, 9, 16)"),
        ({"value": torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16)}, "value has the shape (2, 2, 8, 16)"),
        ({"value": torch.zeros(2, 2, 9, 16)}, "value has the dtype torch.float32, and torch.bfloat16 is wanted"),
        ({"value": torch.zeros(2, 2, 9, 520, dtype=torch.bfloat16)}, "values have 520 dimensions"),
        ({"key_scale": torch.zeros(15)}, "key_scale has the shape (15,)"),
        ({"sinks": torch.zeros(2)}, "sinks has the shape (2,), and (4,) is wanted"),
        ({"bias": torch.zeros(4, 1, 9)}, "bias has the shape (4, 1, 9), which does not spread to (2, 4, 1, 9)"),
        ({"bias": torch.zeros(1, 3, 1, 9)}, "does not spread"),
        ({"key_scales": torch.zeros(2, 2, 8, 1)}, "key_scales has the shape (2, 2, 8, 1)"),
        ({"key_scales": torch.zeros(1, 2, 1, 15)}, "which does not spread to (2, 2, 1, 16)"),
        ({"pages": torch.zeros(2, 3)}, "pages has the dtype torch.float32"),
        ({"key_rotation": rotation(8)}, "cosine has the shape (8, 8), and (9, 8) or (2, 1, 9, 8) is wanted"),
        ({"key_rotation": rotation(9, 8, 9)}, "8 pairs of dimensions 9 apart do not lie in a head of 16"),
        ({"key_rotation": steady(8, 8)}, "steady cosine has the shape (8, 8), and (9, 8) or (2, 1, 9, 8) is wanted"),
        ({"key_rotation": steady(9, 7)}, "steady cosine has the shape (9, 7)"),
        ({"query": torch.zeros(2, 4, 10, 16, dtype=torch.bfloat16)}, "its queries are the last of the text"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, "it has no gradient"),
        ({"key_scale": torch.zeros(16, requires_grad=True)}, "it has no gradient"),
        ({"value": torch.zeros(2, 2, 9, 16, dtype=torch.bfloat16, requires_grad=True)}, "it has no gradient"),
        ({"mask": Mask(causal=True, lengths=ints(3))}, "lengths has the shape (3,), and (2,) is wanted"),
        ({"mask": Mask(causal=True, key_mask=ints(2, 9))}, "key_mask has the dtype torch.int32"),
        ({"mask": Mask(causal=True, positions=(ints(2), ints(9)))}, "positions of queries has the shape (2,)"),
        ({"sinks": torch.zeros(4, device="meta")}, "one tensor is on cpu and another on meta"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(changes: dict[str, Any], reason: str):
    triton_decode.check(call())
    with pytest.raises(TwofoldError) as caught:
        triton_decode.check(call(**changes))
    assert reason in str(caught.value)
    assert str(caught.value).count("\n") == 0


# How it is shared out


@given(units=st.integers(1, 400), tiles=st.integers(0, 3000), programs=st.integers(1, 600))
def test_keys_are_shared_out_so_that_no_other_way_is_faster(units: int, tiles: int, programs: int):
    def rounds(parts: int) -> int:
        return -(-units * parts // programs) * (-(-tiles // parts) + 1)

    parts = parts_of(units, tiles, programs)
    assert 1 <= parts <= max(1, tiles)
    assert rounds(parts) == min(rounds(other) for other in range(1, max(1, min(tiles, 256)) + 1))


def test_the_shapes_that_were_measured_fill_an_h100():
    """Of 132 multiprocessors, and of the time at the end of which the slowest program is done."""
    for units, head_dim, group, keys in (
        (256, 64, 1, 8192),
        (128, 128, 4, 8192),
        (8, 128, 4, 131072),
        (16, 512, 8, 16384),
    ):
        shape = Call(head_dim=head_dim, value_dim=head_dim, rows=group, bits=16, shares=True, causal=True)
        plan, parts = plan_of(shape, units, keys, 132)
        programs = tiles_of(shape, rows_of(shape)).programs * 132
        tiles = keys / plan.keys
        rounds = -(-units * parts // programs) * -(-tiles // parts)
        assert units * tiles / programs / rounds > 0.9


def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What it does where there is one, or Triton's interpreter, is tested by ``interpreted_decode.py``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    main = importlib.import_module("decode_gpu").main
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as caught:
            main([])
        assert caught.value.code == 2
        assert "there is no GPU here" in capsys.readouterr().err
    if not IS_INTERPRETING:
        with pytest.raises(SystemExit):
            main(["--self-check"])
        assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--shapes", "1x2"])
    assert "is no shape" in capsys.readouterr().err


# That it compiles


OTHERS = {80: 163 * 1024, 89: 99 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory that a program may take, by compute capability: of an A100, of its like for desks, of a B200, and of its like for desks."""
TENSOR_MEMORY = 512
"""Columns of the memory in which a B200 adds up products."""


class Target:
    """A GPU that is not here."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """What became of a kernel: registers of a thread, bytes of them that found no room, bytes of shared memory, and how products are made."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        file = folder / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", said)
        assert found is not None
        self.registers, self.spilled = map(int, found.groups())
        self.shared, self.warps = kernel.metadata.shared, kernel.metadata.num_warps
        self.columns = getattr(kernel.metadata, "tmem_size", 0)  # of the memory that tensor cores of newer GPUs have
        code = kernel.asm["ttgir"]
        self.copies, self.group_products = code.count("async_copy_global_to_local"), code.count("warp_group_dot ")
        self.products = self.group_products + code.count("tt.dot ")

    @property
    def programs(self) -> int:
        """How many a multiprocessor of an H100 holds."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min((SHARED_BYTES + 1024) // (self.shared + 1024), 65536 // registers)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Compiled]]:
    """The kernels of the last call, by name, which were compiled and not started."""
    from twofold.kernels.triton import decode_launch

    found: dict[str, Compiled] = {}

    def launch(kernel: Any, programs: int, arguments: tuple, *, warps: int, stages: int) -> None:
        made = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, num_stages=stages)
        found[kernel.fn.__name__] = Compiled(made, tmp_path)

    monkeypatch.setattr(decode_launch, "launch", launch)
    monkeypatch.setattr(decode_launch, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Target())
    forget_gpus()
    yield found
    triton.runtime.driver._active = active


def forget_gpus() -> None:
    """Kernels compile for the GPU that they saw first, and what is not here may become another."""
    from twofold.kernels.triton import decode

    decode.attend.device_caches.clear()
    decode.combine.device_caches.clear()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two tensors": {"shares": False},
    "full rotation": {"pairs": 0.5},
    "full rotation, steady": {"pairs": 0.5, "is_steady": True},
    "partial rotation": {"pairs": 0.125},
    "partial rotation, steady": {"pairs": 0.125, "is_steady": True},
    "rotation of the first dimensions": {"pairs": 0.125, "distance": 0.125},
    "int8": {"codes": torch.int8},
    "float8": {"codes": torch.float8_e4m3fn, "per_token": False},
    "int8 and rotation": {"codes": torch.int8, "pairs": 0.125, "is_steady": True},
    "shared key": {"extension": 64},
    "pages": {"page": 16},
    "int8, all that is wide": {"codes": torch.int8, "pairs": 0.5, "extension": 128, "page": 16},
    "everything else": {"beside": True},
}


def shaped(head_dim: int, group: int, dtype: torch.dtype, **kind: Any) -> Inputs:
    """A call of some kind; its numbers are not looked at."""
    batch, kv_heads, num_keys, page = kind.get("batch", 2), kind.get("kv_heads", 2), 4096, kind.get("page", 0)
    rows = (batch * num_keys // page, kv_heads, page) if page else (batch, kv_heads, num_keys)
    key = torch.zeros((*rows, head_dim), dtype=kind.get("codes", dtype))
    value = key if kind.get("shares", True) else torch.zeros_like(key)
    extension, pairs = kind.get("extension", 0), int(head_dim * kind.get("pairs", 0))
    given: dict[str, Any] = {}
    if "codes" in kind:
        scales = torch.zeros((*rows, 1) if kind.get("per_token", True) else (1, kv_heads, 1, head_dim))
        given |= {"key_scales": scales, "value_scales": scales}
    if pairs:
        table = torch.zeros(num_keys, pairs, dtype=dtype)
        distance = int(head_dim * kind.get("distance", 0.5))
        steady = (table.float(), table.float()) if kind.get("is_steady") else None
        given["key_rotation"] = Rotation(cosine=table, sine=table, distance=distance, steady=steady)
    mask = Mask(causal=True)
    if page:
        given["pages"] = ints(batch, num_keys // page)
        mask = Mask(causal=True, lengths=ints(batch))
    if kind.get("beside"):
        given |= {"bias": torch.zeros(1, 1, 1, num_keys), "sinks": torch.zeros(kv_heads * group), "soft_cap": 5.0}
        given["key_scale"] = torch.zeros(head_dim, dtype=dtype)
        positions = torch.zeros(1, dtype=torch.long), torch.zeros(num_keys, dtype=torch.long)
        mask = Mask(causal=True, window_tokens=100, positions=positions, key_mask=torch.ones(batch, num_keys).bool())
    if extension:
        given["key_extension"] = torch.zeros(batch, 1, num_keys, extension, dtype=dtype)
    query = torch.zeros(batch, kv_heads * group, 1, head_dim + extension, dtype=dtype)
    return Inputs(query=query, key=key, value=value, mask=mask, scale=1.0, **given)


def compile_and_check(inputs: Inputs, compiled: dict[str, Compiled], max_spilled: int) -> Compiled:
    from twofold.kernels.triton import decode_launch

    decode_launch.attend(inputs)
    made, shape = compiled["attend"], decode_launch.call_of(inputs)
    assert made.shared <= SHARED_BYTES
    assert made.programs >= tiles_of(shape, rows_of(shape)).programs - (inputs.bias is not None)
    assert made.spilled <= max_spilled
    # Tiles are on their way while others are multiplied; those of 8-bit numbers in registers.
    assert made.copies > 0 or shape.bits == 8
    return made


needs_compiler = pytest.mark.skipif(IS_INTERPRETING, reason="what is interpreted is not compiled")


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_one_tile_in_shared_memory_serves_both_products(head_dim: int, compiled: dict[str, Compiled]):
    made = compile_and_check(shaped(head_dim, 4, torch.bfloat16), compiled, max_spilled=0)
    assert (made.group_products, made.products) == (2, 2)
    assert compiled["combine"].spilled == 0


@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "int8", "pages", "everything else"])
def test_there_may_be_one_of_everything(kind: str, compiled: dict[str, Compiled]):
    """Triton takes a number that is 1 for a constant, which is no tensor: of a text alone, of one head, and of one key too."""
    inputs = shaped(64, 1, torch.bfloat16, batch=1, kv_heads=1, **KINDS[kind])
    compile_and_check(inputs, compiled, max_spilled=0)
    assert "combine" in compiled
    if kind == "plain":
        compile_and_check(replace(inputs, key=(key := inputs.key[:, :, :1]), value=key), compiled, max_spilled=0)


@needs_compiler
def test_a_text_that_grows_compiles_nothing_anew(compiled: dict[str, Compiled]):
    """Neither one in room that is there, nor one that is moved; of those that are short the output is finished at once."""
    from twofold.kernels.triton import decode, decode_launch

    inputs = shaped(64, 4, torch.bfloat16)
    for tokens in (4096, 4081, 4000, 2900, 700):
        for key in (inputs.key[:, :, :tokens], inputs.key[:, :, :tokens].contiguous()):
            decode_launch.attend(replace(inputs, key=key, value=key))
    for kernel in (decode.attend, decode.combine):
        ((compiled_ones, *_),) = kernel.device_caches.values()
        assert len(compiled_ones) == 1


@needs_compiler
def test_what_gemma_needs_compiles(compiled: dict[str, Compiled]):
    """Of 512 dimensions 128 turn: nothing is read twice, and three tiles of 64 keys fit."""
    made = compile_and_check(shaped(512, 8, torch.bfloat16, pairs=0.125, is_steady=True), compiled, max_spilled=64)
    assert made.group_products == made.products
    assert made.shared > 3 * 64 * 512 * 2


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 17, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_compiles(head_dim: int, group: int, kind: str, dtype: torch.dtype, compiled: dict[str, Compiled]):
    compile_and_check(shaped(head_dim, group, dtype, **KINDS[kind]), compiled, max_spilled=800)


@pytest.fixture
def elsewhere(compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Inputs], Compiled]:
    """A call's kernel, compiled for another GPU that is not here either."""
    from twofold.kernels.triton import decode_launch

    def compile_for(capability: int, inputs: Inputs) -> Compiled:
        triton.runtime.driver.set_active(Target(capability))
        room = planned_bytes(capability // 10, OTHERS[capability])
        monkeypatch.setattr(decode_launch, "shared_bytes", lambda _: room)
        forget_gpus()
        decode_launch.attend(inputs)
        return compiled["attend"]

    return compile_for


@needs_compiler
@pytest.mark.parametrize(("capability", "kind"), [(100, "partial rotation, steady"), (89, "int8, all that is wide")])
def test_the_widest_heads_fit_into_other_gpus(capability: int, kind: str, elsewhere: Callable[[int, Inputs], Compiled]):
    made = elsewhere(capability, shaped(512, 8, torch.bfloat16, **KINDS[kind]))
    assert made.shared <= OTHERS[capability]
    assert made.columns <= TENSOR_MEMORY
    assert (made.columns > 0) == (capability == 100)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "two tensors", "full rotation", "partial rotation, steady"),
        *("int8", "shared key", "pages", "int8, all that is wide"),
    ],
)
@pytest.mark.parametrize("group", [1, 17, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("capability", OTHERS)
def test_it_fits_into_other_gpus(
    capability: int, head_dim: int, group: int, kind: str, elsewhere: Callable[[int, Inputs], Compiled]
):
    made = elsewhere(capability, shaped(head_dim, group, torch.bfloat16, **KINDS[kind]))
    assert made.shared <= OTHERS[capability]
    assert made.columns <= TENSOR_MEMORY
