"""Settings for every test: one thread for each process (the suite runs a process for each core), steady Hypothesis."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Transformers' own tests, where a checkout of them is given (see test_citizenship_mixins.py), have marks of their own."""
    checkout, transformers = os.environ.get("TWOFOLD_TRANSFORMERS_CHECKOUT"), find_spec("transformers")
    if checkout and transformers and transformers.origin:
        files = [
            path
            for below in ("*.py", "generation/*.py", "exporters/*.py")
            for path in Path(checkout, "tests").glob(below)
        ]
        files.append(Path(transformers.origin).with_name("testing_utils.py"))
        for mark in {mark for path in files for mark in re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))}:
            config.addinivalue_line("markers", mark)
