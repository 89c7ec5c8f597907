"""The compiled backend touches no memory but that of its tensors and its own, and does nothing that C++ leaves undefined.

It is built once more with AddressSanitizer and UndefinedBehaviorSanitizer (``TWOFOLD_SANITIZE``) and called in a process by itself. Reads by registers of
tiles and reads under a mask are not watched: compilers make them of instructions that a sanitizer does not see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.kernels import native

ROOT = Path(__file__).parent.parent
CALLS = Path(__file__).with_name("sanitized_calls.py")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not native.levels(), reason="Twofold was installed without a compiler"),
]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([str(part) for part in command], env=environment, text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def runtime() -> str:
    """Where GCC's AddressSanitizer lies, which must be loaded before anything else."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    pytest.importorskip("nanobind")
    found = run(compiler, "-print-file-name=libasan.so").stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("needs GCC's AddressSanitizer")
    return found


def build(source: Path, folder: Path) -> Path:
    """The extension module of this source tree, with the sanitizers."""
    nanobind = run(sys.executable, "-m", "nanobind", "--cmake_dir").stdout.strip()
    options = {
        "TWOFOLD_SANITIZE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind,
        "CMAKE_CXX_COMPILER": "g++",
    }
    made = run("cmake", "-S", source, "-B", folder, *(f"-D{name}={value}" for name, value in options.items()))
    assert made.returncode == 0, made.stderr
    made = run("cmake", "--build", folder, "--parallel", str(os.cpu_count()))
    assert made.returncode == 0, made.stdout + made.stderr
    (module,) = folder.glob("_native*.so")
    return module


def called(module: Path, runtime: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable,
        CALLS,
        module,
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        OMP_NUM_THREADS="2",
    )


def test_nothing_is_touched_beside_tensors(runtime: str, tmp_path: Path):
    found = called(build(ROOT, tmp_path / "build"), runtime)
    assert found.returncode == 0, found.stderr
    assert "Sanitizer" not in found.stderr
    assert "runtime error" not in found.stderr
    assert found.stdout == "all calls returned\n"


def test_a_read_past_the_end_would_be_seen(runtime: str, tmp_path: Path):
    """The same, with a line of the source changed so that it reads one row more than there is."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "native", source / "native")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    tile = source / "native" / "tile.hpp"
    right, wrong = "if (k >= count || (some", "if (k > count || (some"
    text = tile.read_text(encoding="utf-8")
    assert right in text
    tile.write_text(text.replace(right, wrong), encoding="utf-8")
    found = called(build(source, tmp_path / "build"), runtime)
    assert found.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in found.stderr
