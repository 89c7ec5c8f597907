"""What the benchmark of few bits says: every way of holding a cache on text, in rows; tiny here, so that nothing but its working is judged."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.cache_spec import CacheSpec

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bits() -> ModuleType:
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("halve_bits")


@pytest.fixture(scope="module")
def rows(bits: ModuleType) -> dict[str, dict[str, Any]]:
    found = [*bits.bit_rows(bits.READINGS["tiny"], "cpu")]
    assert len({row["name"] for row in found}) == len(found) == len(bits.MODELS) * (1 + 7 + 4)
    return {row["name"]: row for row in found}


@pytest.mark.parametrize("name", ["Gemma 4", "GPT-2", "Llama"])
def test_few_bits_move_logits_and_one_tensor_does_not(rows: dict[str, dict[str, Any]], name: str):
    def moved(way: str) -> float:
        return rows[f"logits moved, {name}, {way}"]["value"]

    assert rows[f"logits moved, {name}, one tensor, as computed"]["met"] is True
    assert moved("one tensor, as computed") < moved("keys and values in 8 bits")
    for way in ("one tensor", "keys and values"):
        assert 0 < 4 * moved(f"{way} in 8 bits") < moved(f"{way} in 4 bits")
    assert 0 < moved("bfloat16, as it was") < 0.2
    assert 0.3 < rows[f"bits per byte of unseen text, {name}, of the 8 that it has"]["value"] < 1.2


def test_a_cache_that_holds_everything_as_computed_moves_nothing(bits: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The liar: where the bits are not spent, the rows of bits say so."""
    model, text = bits.gemma().eval(), torch.arange(2 * 40).view(2, 40)
    monkeypatch.setattr(bits, "CacheSpec", lambda bits: CacheSpec(bits=bits, tail_tokens=40))
    exact = bits.stepped(model, text, 24)
    said = dict(bits.answers(model, text, 24))
    for way in ("one tensor in 4 bits", "keys and values in 4 bits"):
        torch.testing.assert_close(said[way], exact, rtol=1e-4, atol=1e-4)


def test_models_learn_what_they_are_trained_on_and_are_asked_what_they_are_not(bits: ModuleType):
    trained, held_out = bits.texts()
    assert len(trained) > 4 * len(held_out) > 100_000
    draw = torch.Generator().manual_seed(0)
    rows: Tensor = bits.windows(held_out, 3, 50, draw)
    assert rows.shape == (3, 50)
    assert bytes(rows[0].tolist()) in bytes(held_out.tolist())
    assert bytes(rows[0].tolist()) not in bytes(trained.tolist())


def test_it_is_an_option_of_the_benchmark_of_halving(
    bits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    halve = importlib.import_module("halve")
    asked: list[tuple[Any, str]] = []
    monkeypatch.setattr(halve, "bit_rows", lambda *given: asked.append(given) or [{"name": "logits moved"}])
    halve.main(["--bits", "--shape", "tiny", "--json"])
    assert asked == [(bits.READINGS["tiny"], "cpu")]
    assert json.loads(capsys.readouterr().out) == [{"name": "logits moved"}]
