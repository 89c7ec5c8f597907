"""What this machine has, and what works on it: facts are looked up, abilities are tried.

Nothing is imported before it is tried, so that a machine without a working torch gets a diagnosis too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from twofold._version import __version__
from twofold.lazy import Lazy

PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy", "pandas", "safetensors", "plotly", "pydantic")
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "data": ("datasets", "pillow", "pyarrow", "scikit-learn"),
    "tensorboard": ("tensorboard",),
    "docs": ("mkdocs", "mkdocs-material", "mkdocstrings"),
    "dev": ("hypothesis", "mypy", "playwright", "pytest", "ruff"),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
# The names that Linux (x86 and ARM) and macOS give to what attention can use.
CPU_FEATURES: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX BF16": ("amx_bf16",),
    "NEON": ("asimd", "neon", "advsimd"),
    "BF16": ("bf16", "feat_bf16"),
    "SVE": ("sve",),
}

Outcome = Literal["works", "fails", "absent"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One ability, tried. ``is_core``: Twofold is of no use without it."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    is_core: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Facts and checks. ``works`` is whether every core check passed."""

    version: str
    machine: Mapping[str, str]
    packages: Mapping[str, str]
    extras: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def works(self) -> bool:
        """Whether everything that Twofold cannot do without works."""
        return all(check.outcome == "works" for check in self.checks if check.is_core)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"works": self.works}


def diagnose(folder: Path) -> Diagnosis:
    """Look at the machine and try everything; ``folder`` is where free disk is measured."""
    return Diagnosis(
        version=__version__,
        machine=machine(folder),
        packages={name: _version_of(name) for name in PACKAGES},
        extras={name: _extra(parts) for name, parts in EXTRAS.items()},
        checks=checks(),
    )


# Facts


def machine(folder: Path) -> dict[str, str]:
    """Hardware and operating system, in words."""
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(folder)
    return {
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "processor": _processor(),
        "features": ", ".join(cpu_features(_flags())) or "none that matters here",
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "disk": f"{disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} GiB",
        "graphics": _graphics(),
        "browser": next((path for name in BROWSERS if (path := shutil.which(name))), "none found"),
    }


def usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features(flags: set[str]) -> list[str]:
    """Which of :data:`CPU_FEATURES` a processor with these flags has."""
    return [name for name, known in CPU_FEATURES.items() if flags & set(known)]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def _flags() -> set[str]:
    text = " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)[:1])
    if platform.system() == "Darwin":
        told = _output("sysctl", "hw.optional", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        switches = re.findall(r"hw\.optional\.(?:arm\.)?(\w+): 1", told)
        text = " ".join([*switches, *re.findall(r"machdep\.cpu\.\w+: (.*)", told)])
    return set(text.lower().split())


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if found:
        return found.group(1)
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _graphics() -> str:
    found = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if found:
        return "; ".join(
            f"{name}, {memory}, driver {driver}"
            for name, memory, driver in (line.split(", ") for line in found.splitlines())
        )
    return "none found"


def _output(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extra(parts: tuple[str, ...]) -> str:
    missing = [name for name in parts if _version_of(name) == "not installed"]
    return f"missing: {', '.join(missing)}" if missing else "installed"
