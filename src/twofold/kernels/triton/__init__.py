"""Where Triton runs. The modules of this package hold what is compiled for a GPU, and import Triton at their top; nothing else of the project does.

A backend names such a module by :class:`twofold.lazy.Lazy`, so that it is imported with the first call: who has no Triton, or no GPU, never waits for it.
On a CPU there is Triton's interpreter, which is slow and serves tests: it is on where ``TRITON_INTERPRET=1`` was set before Triton was first imported.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from twofold.kernels.triton_decode_plan import SHARED_BYTES

IS_INSTALLED = find_spec("triton") is not None
LEAST_SHARED_BYTES = 99 * 1024
"""That a program may take on any GPU of compute capability 8.0 and above."""
HAVE_TENSOR_MEMORY = (10, 11)
"""With which the compute capability of such GPUs begins."""
INTERPRETED_MULTIPROCESSORS = 4
"""Of the interpreter: so few that small tests share a sequence out among several programs, and so many that they do."""


def why_not(device: str) -> str:
    """Why Triton cannot run on a device ("cuda", "cpu"); empty: it can."""
    if not IS_INSTALLED:
        return "Triton is not installed"
    if device == "cpu":
        return "" if is_interpreting() else "it runs on a GPU"
    if device != "cuda":
        return f"it runs on a GPU that torch calls cuda, and not on {device}"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if torch.version.hip is not None:
        return "its kernels were never compiled for GPUs of AMD"
    major, minor = compute_capability()
    return "" if major >= 8 else f"the GPU's compute capability is {major}.{minor}, and 8.0 is the least"


def is_interpreting() -> bool:
    """Whether kernels are carried out by Triton's interpreter. Read from the environment, as Triton itself does when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_float8(device: str) -> bool:
    """Whether it reads float8_e4m3fn; float8_e5m2 is half a float16, which all do."""
    return device == "cpu" or compute_capability() >= (8, 9)


# What torch.compiler.assume_constant_result does, which imports the whole of the compiler to do it.
for asked in (why_not, has_float8):
    asked._dynamo_marked_constant = True  # type: ignore[union-attr]


def compute_capability(device: torch.device | None = None) -> tuple[int, int]:
    """That of a GPU, or of the one in use."""
    index = None if device is None else device.index
    return capability_of(torch.cuda.current_device() if index is None else index)


@cache
def capability_of(index: int) -> tuple[int, int]:
    """The same by the GPU's number."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs, or small groups of them, run at a time."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """What a program is planned to take of the shared memory of a multiprocessor; of the interpreter as much as on an H100."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return planned_bytes(properties.major, int(getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)))


def planned_bytes(major: int, shared: int) -> int:
    """Of what a GPU gives a program: all, but where the tensor cores take both factors from there, for which Triton needs more than is planned (B200)."""
    return min(shared, LEAST_SHARED_BYTES) if major in HAVE_TENSOR_MEMORY else shared
