"""Calls of the compiled backend by the build of it that is named on the command line, at every level: what test_native_sanitized.py runs in a process by itself.

Tensors fill their memory exactly, so that a checker of addresses sees the first byte that is read or written beside one..
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import torch
from hypothesis import HealthCheck, Phase, given, settings

from test_kernels_native import DTYPES, Draw, problems, small
from twofold.kernels import Inputs, native

PROBLEMS = 150
LARGE = [(2, 1100, 512), (1, 2500, 128), (3, 130, 72)]
"""Sequences, keys and head_dim of calls that take several threads, and of rows that are longer than a tile of registers."""


def built(path: str) -> ModuleType:
    """The extension module in this file."""
    spec = importlib.util.spec_from_file_location("twofold.kernels._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exactly(_: Draw, x: torch.Tensor) -> torch.Tensor:
    """In memory of its own, in place of :meth:`Draw.guarded`."""
    return x.clone(memory_format=torch.contiguous_format)


def call(inputs: Inputs) -> None:
    for level in native.levels():
        native.attend(inputs, level=level)


@given(inputs=problems())
@settings(
    max_examples=PROBLEMS,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def call_small(inputs: Inputs) -> None:
    call(inputs)


def call_large(batch: int, keys: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = small(dtype, batch=batch, keys=keys, head_dim=head_dim)
    codes, scales = (inputs.key * 30).to(torch.int8), torch.rand(batch, 2, keys, 1)
    call(inputs)
    call(replace(inputs, key=codes, value=codes, key_scales=scales, value_scales=scales))


def main(path: str) -> None:
    native._native = built(path)
    Draw.guarded = exactly  # type: ignore[method-assign]
    call_small()
    for shape in LARGE:
        for dtype in DTYPES:
            call_large(*shape, dtype)
    sys.stdout.write("all calls returned\n")


if __name__ == "__main__":
    main(sys.argv[1])
