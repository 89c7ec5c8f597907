"""Kernels on a CPU: Triton's interpreter, in a process of its own.

Triton asks for ``TRITON_INTERPRET`` when it is imported, which another test of the same process may have done already, and with it ``auto`` would choose
interpreted kernels in every test. So tests that carry kernels out stand in files that pytest does not collect by itself, ``interpreted_*.py``; a test
that it does collect runs such a file by :func:`run_interpreted`. By hand: ``TRITON_INTERPRET=1 pytest -n0 tests/interpreted_decode.py``, or on a machine with a GPU
without the variable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETING or not torch.cuda.is_available() else "cuda"


IS_ROOMY = DEVICE == "cpu" or torch.cuda.get_device_properties(0).total_memory > 30 << 30
"""Whether tensors may be spread out over gigabytes of which hardly any are touched: a CPU's system gives no others, a GPU all of them."""


def run_interpreted(file: str, *options: str, interpret: bool = True) -> None:
    """Run the tests of a file beside this one in a process of its own; fails with what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-x", *options, str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 do what a GPU does.

    It takes arrays of one number for that number, which NumPy from 2.4 on refuses, where a loop's bounds are tensors; it cuts numbers off where they are to be
    rounded to 16 bits, knows no constants of bfloat16, and multiplies matrices of bfloat16 as if their bits were whole numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    floats = {
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    floats |= {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    kept_as_bits = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}
    cast, patch = InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor
    call, make_kernel_ready = interpreter.InterpretedFunction.__call__, interpreter._patch_lang

    def as_torch(handle):
        given = torch.from_numpy(np.array(handle.data))
        return given.view(floats[handle.dtype.scalar]) if handle.dtype.scalar in kept_as_bits else given

    def convert(self, source, kind, *_):
        kind = kind.scalar
        if kind not in floats or (kind in (tl.float32, tl.float64) and source.dtype.scalar not in kept_as_bits):
            return cast(self, source, kind)
        found = as_torch(source).to(floats[kind])
        found = found.view(kept_as_bits[kind]) if kind in kept_as_bits else found
        return TensorHandle(found.numpy(), kind)

    def dot(self, a, b, total, *_):
        wide = [as_torch(x).to(torch.float32).numpy() for x in (a, b)]
        return TensorHandle(wide[0] @ wide[1] + total.data, total.dtype.scalar)

    def bfloat16_constant(self, value):
        return convert(self, TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.bfloat16)

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def make_ready(kernel):
        """The language as a kernel speaks it, and as its own library does, which is written in it."""
        scope = make_kernel_ready(kernel)
        interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(tl.core, scope)
        return scope

    def call_from_kernel(self, *given, **named):
        """What a kernel of ours calls speaks the language that was made ready for the kernel; to make it ready once more takes longer than the call."""
        if not self.fn.__module__.startswith(("twofold.", "triton.language.")):
            return call(self, *given, **named)
        return self.rewrite()(*given, **named)

    interpreter.InterpretedFunction.__call__ = call_from_kernel
    interpreter._patch_lang = make_ready
    # A third of the time goes into looks for whole numbers that are too large; a GPU does not look either.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.get_bf16 = bfloat16_constant
    interpreter._patch_lang_tensor = patch_and_mend


if IS_INTERPRETING:
    mend_interpreter()
