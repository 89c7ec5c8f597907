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


def names_in_wheel(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """The name of the wheel that pip makes of the sources, and of all files in it."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    settings = ["-C", f"build-dir={folder / 'build'}"]
    subprocess.run([*command, *settings], check=True, capture_output=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_there_is_a_wheel_for_each_python_that_is_supported():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = [text.rpartition(" ")[2] for text in settings["project"]["classifiers"] if ":: 3." in text]
    assert settings["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in versions]


@pytest.mark.long
@needs_builders
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_a_compiler_makes_the_kernels(tmp_path: Path):
    wheel, names = names_in_wheel(tmp_path)
    assert "none-any" not in wheel
    assert [name for name in names if name.startswith("twofold/kernels/_native.")]


@pytest.mark.long
@needs_builders
def test_without_a_compiler_the_wheel_is_pure_python(tmp_path: Path):
    wheel, names = names_in_wheel(tmp_path, CXX="/bin/false")
    assert "none-any" in wheel
    assert not [name for name in names if "_native" in name]
    assert "twofold/kernels/native.py" in names
    assert [name for name in names if name.endswith(".toml")]
