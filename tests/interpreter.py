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

import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETING or not torch.cuda.is_available() else "cuda"


def run_interpreted(file: str, *options: str, interpret: bool = True) -> None:
    """Run the tests of a file beside this one in a process of its own; fails with what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-x", *options, str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def mend_interpreter() -> None:
    """NumPy from 2.4 on takes no array of one number for that number, as Triton 3.6 does where a loop's bounds are its own tensors."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if IS_INTERPRETING:
    mend_interpreter()
