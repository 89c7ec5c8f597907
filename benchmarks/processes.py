"""Memory of a process: what is resident now, the most that ever was, and fresh processes to measure in."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def output_of(script: str, *arguments: str) -> str:
    """What a fresh process that runs ``script`` prints; what it says of its own errors is shown. Raises CalledProcessError where it fails."""
    # With glibc's moving threshold, freed blocks stay with the process or not by chance: the same model's peak varied by a tenth.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def peak_resident_bytes() -> int:
    """The most memory that this process ever held. Linux carries ``ru_maxrss`` over from the parent process, so it is not used there."""
    if STATUS.exists():
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process holds now, after all that is free has been given back."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(
            ctypes.CDLL(None), "malloc_trim", None
        )  # glibc has it, other C libraries give back by themselves
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss


def status_bytes(name: str) -> int:
    """A size that Linux tells of this process (VmHWM, VmData ...)."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text())[1])
