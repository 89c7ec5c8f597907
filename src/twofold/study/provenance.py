"""What a number came from: the code, the libraries, the machine, and when. No torch."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from twofold._version import __version__

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "accelerate", "numpy")
# What shows, counts or explains results cannot change them; all the rest of the package can, and is hashed.
CANNOT_CHANGE_RESULTS = frozenset(
    {
        "__init__",
        "__main__",
        "claims",
        "cli",
        "cost",
        "doctor",
        "explain",
        "lazy",
        "picture",
        "presets",
        "report",
        "study",
    }
)


@cache
def code_hash() -> str:
    """SHA-256 of everything that decides what a run gives: our sources below the studies, and the versions of the libraries."""
    digest = sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.with_suffix("").parts[0] not in CANNOT_CHANGE_RESULTS:
            digest.update(inside.as_posix().encode() + b"\0" + sha256(path.read_bytes()).digest())
    digest.update(repr(library_versions()).encode())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that compute."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe(command: str) -> dict[str, Any]:
    """The provenance of a study that begins now: JSON-ready, without paths of this machine."""
    return {
        "twofold": __version__,
        "git_commit": git_commit(),
        "code_hash": code_hash(),
        "python": platform.python_version(),
        **library_versions(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "command": command,
        "started_at": now(),
        "invocations": [],
        "code_changes": [],
        "plan_changes": [],
    }


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str:
    """The commit of the package's own checkout, "-dirty" where files differ from it; empty where the package is not in one."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no", ".") else ""
    return (_git("rev-parse", "HEAD") or "") + dirty


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Processor, cores that may be used, and memory; graphics processors are named by the processes that use them."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def graphics_processors() -> int:
    """How many NVIDIA processors this process may use; whether torch can use them, only torch knows."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    present = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if allowed is None else min(present, len([name for name in allowed.split(",") if name.strip()]))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(bound, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota
        return bound
