"""The wheel: with the compiled kernels where there is a compiler, pure Python where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HAS_BUILDERS = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "nanobind"))
needs_builders = pytest.mark.skipif(
    not HAS_BUILDERS or not shutil.which("cmake"), reason="needs scikit-build-core, nanobind and cmake"
)

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")

VERSIONS = [
    text.rpartition(" ")[2]
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    if ":: 3." in text
]
COMPUTES = """
import importlib.util, sys
import numpy

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
draw = numpy.random.default_rng()
assert native.levels()
for level in native.levels():
    query, stream = draw.normal(size=(2, 8, 1, 48)).astype("float32"), draw.normal(size=(2, 2, 300, 48)).astype("float32")
    output = numpy.empty_like(query)
    native.attend(
        query, output, stream, scale=0.2, is_causal=True, window=0, soft_cap=0.0, query_is_bfloat16=False, threads=2, level=level
    )
    keys = stream.astype("float64").repeat(4, axis=1)
    weights = numpy.exp(0.2 * query.astype("float64") @ keys.swapaxes(2, 3))
    numpy.testing.assert_allclose(output, weights / weights.sum(-1, keepdims=True) @ keys, rtol=1e-4, atol=1e-5)
"""


def wheel_made(folder: Path, python: str = sys.executable, *settings: str, **environment: str) -> Path:
    """The wheel that pip makes of the sources, by a Python's executable."""
    command = [python, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(folder), *settings]
    command += ["-C", f"build-dir={folder / 'build'}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_there_is_a_wheel_for_each_python_that_is_supported():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in VERSIONS]


@pytest.mark.long
@needs_builders
@needs_compiler
def test_a_compiler_makes_the_kernels(tmp_path: Path):
    wheel = wheel_made(tmp_path, sys.executable, "--no-build-isolation")
    assert "none-any" not in wheel.name
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("twofold/kernels/_native.")]


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernels_of_every_pythons_wheel_compute_what_float64_does(version: str, tmp_path: Path):
    """Without torch, whose wheels for other Pythons are gigabytes: the compiled module takes numpy's arrays as well."""
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "--version"], check=False, capture_output=True).returncode:
        pytest.skip(f"Python {version} is not installed")
    own = tmp_path / "own" / "bin" / "python"
    subprocess.run([python, "-m", "venv", str(tmp_path / "own")], check=True)
    subprocess.run([own, "-m", "pip", "install", "--quiet", "numpy"], check=True)
    with zipfile.ZipFile(wheel_made(tmp_path, str(own))) as wheel:
        (compiled,) = (name for name in wheel.namelist() if name.startswith("twofold/kernels/_native."))
        wheel.extract(compiled, tmp_path)
    assert f"-{version.replace('.', '')}-" in compiled
    subprocess.run([own, "-c", COMPUTES, str(tmp_path / compiled)], check=True)


@pytest.mark.long
@needs_builders
def test_without_a_compiler_the_wheel_is_pure_python(tmp_path: Path):
    wheel = wheel_made(tmp_path, sys.executable, "--no-build-isolation", CXX="/bin/false")
    names = zipfile.ZipFile(wheel).namelist()
    assert "none-any" in wheel.name
    assert not [name for name in names if "_native" in name]
    assert "twofold/kernels/native.py" in names
    assert [name for name in names if name.endswith(".toml")]
