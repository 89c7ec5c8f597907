"""The oldest Transformers that pyproject.toml allows passes what is asked of models and caches of the newest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "test_cache.py",
    "test_cache_kinds.py",
    "test_cache_stories.py",
    "test_cli_halve.py",
    "test_configuration.py",
    "test_generation.py",
    "test_halving.py",
    "test_halving_afterwards.py",
    "test_halving_assisted.py",
    "test_halving_encoder_decoder.py",
    "test_halving_masks.py",
    "test_halving_placement.py",
    "test_halving_refusals.py",
    "test_language_model.py",
    "test_model_files.py",
    "test_models.py",
]


def oldest() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = (line for line in project["dependencies"] if line.startswith("transformers"))
    found = re.search(r">=(\d+\.\d+)", line)
    assert found
    return found[1] + ".0"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_models_and_caches_work_on_the_oldest(tmp_path: Path):
    """In an environment of its own, which borrows everything else from this one; it is installed from the package index."""
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    borrowed = [str(ROOT / "src"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(f"import sys; sys.path[:0] = [{borrowed[0]!r}]; sys.path += {borrowed[1:]!r}\n")
    installing = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={oldest()}"]
    installed = subprocess.run(installing, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    version = [str(python), "-c", "import transformers, sys; sys.stdout.write(transformers.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True).stdout == oldest()
    testing = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES)]
    tested = subprocess.run(
        testing, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert " passed" in tested.stdout
    assert sys.version_info[:2] == tuple(map(int, site.parent.name.removeprefix("python").split(".")))
