"""Presets: they are the paper's models, counted from the spec; and a name that is not one is told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from twofold.cost import cache_bytes, parameters
from twofold.errors import TwofoldError
from twofold.presets import PRESETS, preset

# Millions of parameters, as published: paper-facts of arXiv:2606.04032 at 300M.
PUBLISHED_300M = {"(Q, K, V)": 305.5, "(Q=K, V)": 284.5, "(Q, K=V)": 284.5, "(Q=K=V)": 263.6}


@pytest.mark.parametrize("tie", PUBLISHED_300M)
def test_the_300m_model_has_the_papers_parameters(tie):
    count = parameters(PRESETS["paper-300m"].with_changes(tie=tie))
    assert round(count / 1e6, 1) == PUBLISHED_300M[tie]


def test_a_count_of_another_shape_is_not_the_papers():
    narrower = PRESETS["paper-300m"].with_changes(intermediate_size=4095)
    assert round(parameters(narrower) / 1e6, 2) != round(parameters(PRESETS["paper-300m"]) / 1e6, 2)


def test_the_larger_models_cache_is_the_papers_at_32k_tokens():
    """5,906 MB in bf16."""
    assert round(cache_bytes(PRESETS["paper-1.2b"], 32768) / 1e6) == 5906


@pytest.mark.parametrize(("name", "whole"), [("300m", "paper-300m"), ("1.2b", "paper-1.2b"), ("tiny", "tiny")])
def test_the_papers_prefix_may_be_left_out(name, whole):
    assert preset(name) is PRESETS[whole]


@pytest.mark.parametrize("name", ["", "300M", "large", "paper-"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(TwofoldError, match=r"paper-300m, paper-1\.2b, small, tiny"):
        preset(name)


def test_a_near_miss_is_named():
    with pytest.raises(TwofoldError, match="did you mean small"):
        preset("smal")


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["tiny"] = PRESETS["small"]


def test_presets_import_no_torch():
    code = "import sys, twofold.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
