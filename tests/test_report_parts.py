"""The parts that a study's design asks for: the law of the difference, and near and far, in every file of the report."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study_fixture import PLAN, write_study
from twofold import report
from twofold.report.parts import parts
from twofold.report.summary import Summary
from twofold.study.results import Results

Scores = Callable[[str, str, int, dict[str, Any]], dict[str, float]]

SIZES = {"w8": 8, "w16": 16, "w32": 32}
RATIOS = ("r5", "r20", "r80", "r320")


def plan(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(PLAN) | changes
    values["variants"] = [values["variants"][index] for index in (0, 1, 4)]
    values["variants"].append(
        {"name": "again", "kind": "control", "note": "Other seeds.", "seed_shift": 7, "expect": {"variant": "mha", "outcome": "same"}}
    )  # fmt: skip
    return values


def budget_plan() -> dict[str, Any]:
    sizes = [{"name": name, "model": {"hidden_size": width}} for name, width in SIZES.items()]
    # The fixture writes a line of metrics for every ten steps: how long a run was is said in its outcome alone.
    ratios = [{"name": name, "training": {"steps": 20}} for name in RATIOS]
    task = PLAN["tasks"][0] | {"grid": [{"name": "size", "points": sizes}, {"name": "ratio", "points": ratios}]}
    return plan(tasks=[task])


def rewritten(folder: Path, scores: Scores) -> Summary:
    """The report of the folder after every run's scores were made anew."""
    for path in folder.glob("runs/*/*/*/outcome.json"):
        task, variant, seed = path.parts[-4:-1]
        outcome = json.loads(path.read_text())
        outcome["scores"] |= scores(task, variant, int(seed.removeprefix("seed-")), outcome)
        path.write_text(json.dumps(outcome))
    report.write(folder)
    return Summary(Results.load(folder))


def of_a_law(task: str, variant: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
    """kv-tied is worse by 0.1 + 0.4 (r/r₀)^-0.5 in r tokens per parameter; the rest is noise."""
    ratio = int(task.rsplit("-r", 1)[1])
    outcome["tokens"] = ratio * outcome["parameters"]
    noise = 0.004 * math.sin(17 * seed + len(task) * len(variant))
    return {"bits_per_byte": 2 + noise + (0.1 + 0.4 * (ratio / 5) ** -0.5) * (variant == "kv-tied")}


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("budget") / "synthetic"
    write_study(folder, complete=True, plan=budget_plan())
    return folder, rewritten(folder, of_a_law)


def test_a_study_over_sizes_and_ratios_gets_the_law(budget: tuple[Path, Summary]):
    _, summary = budget
    (law,) = parts(summary)
    assert law.name == "law"
    kv = next(one for one in law.values["variants"] if one["variant"] == "kv-tied")
    assert len(kv["measured"]) == 12
    found = kv["law"]
    assert [told["tokens_per_parameter"] for told in found["held_out"]] == pytest.approx([320] * 3)
    assert all(told["is_inside"] for told in found["held_out"])
    limit = found["limits"][0]
    assert limit["value"] == pytest.approx(0.1, abs=0.02)
    assert limit["low"] > 0
    assert not limit["holds_zero"]
    gqa = next(one for one in law.values["variants"] if one["variant"] == "gqa-2")
    assert gqa["law"]["limits"][0]["holds_zero"]
    told = " ".join(law.sentences)
    assert "which leaves zero out" in told
    assert "which holds zero" in told
    assert "inside that interval" in told


def test_every_file_of_the_report_has_the_parts(budget: tuple[Path, Summary]):
    folder, summary = budget
    (law,) = parts(summary)
    written = json.loads((folder / "report" / "report.json").read_text())["parts"]
    assert [part["name"] for part in written] == ["law"]
    assert written[0]["sentences"] == list(law.sentences)
    svg = (folder / "report" / "law.svg").read_text()
    assert svg.count('class="marker open"') == 9  # the held-out ratio, 3 sizes, 3 variants
    page = (folder / "report" / "index.html").read_text()
    assert '<section id="law"' in page
    assert 'href="#law"' in page
    assert 'href="law.svg"' in page
    markdown = (folder / "report" / "report.md").read_text()
    assert "## The difference over budgets" in markdown
    assert "](law.svg)" in markdown


def test_a_law_that_does_not_fit_says_so(tmp_path: Path):
    folder = tmp_path / "synthetic"
    sizes, ratios = budget_plan()["tasks"][0]["grid"]
    task = PLAN["tasks"][0] | {"grid": [sizes | {"points": sizes["points"][:2]}, ratios]}
    write_study(folder, complete=True, plan=plan(tasks=[task]))

    def bent(task: str, variant: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
        bits = of_a_law(task, variant, seed, outcome)["bits_per_byte"]
        return {"bits_per_byte": bits + (variant == "kv-tied") * task.endswith("r20")}

    (law,) = parts(rewritten(folder, bent))
    assert "farther from that law than their noise allows" in " ".join(law.sentences)
    assert law.values["variants"][0]["law"]["is_misfit"]


def test_a_law_that_has_too_few_runs_says_so(tmp_path: Path):
    folder = tmp_path / "synthetic"
    sizes, ratios = budget_plan()["tasks"][0]["grid"]
    task = PLAN["tasks"][0] | {"grid": [sizes | {"points": sizes["points"][:1]}, ratios]}
    write_study(folder, complete=True, plan=plan(tasks=[task], seeds=[0]))
    (law,) = parts(rewritten(folder, of_a_law))
    assert law.sentences[0] == "(Q, K=V): too few budgets are measured for a law yet."
    assert law.figure(880)
    assert law.values["variants"][0]["law"] is None
    for path in folder.glob("runs/*/kv-tied/*/status.json"):
        path.write_text('{"status": "failed", "error": "For the test."}')
    (law,) = parts(Summary(Results.load(folder)))
    assert "kv-tied" not in {one["variant"] for one in law.values["variants"]}
    for path in folder.glob("runs/*/*/*/status.json"):
        path.write_text('{"status": "failed", "error": "For the test."}')
    assert not parts(Summary(Results.load(folder)))


BUCKETS = ((1, 15), (16, 31), (32, 63))


def of_places(task: str, variant: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
    """kv-tied is worse by 0.1 near and by 0.3 far in bits, and right 0.2 less often near than the others in accuracy."""
    noise = 0.001 * math.sin(seed + len(variant))
    if task == "bytes":
        return {
            f"bits_per_byte@{a}-{b}": 2 + noise + (variant == "kv-tied") * (0.3 if a == 32 else 0.1) for a, b in BUCKETS
        }
    return {f"accuracy@{a}-{b}": 0.9 + noise - 0.2 * (variant == "kv-tied") * (a < 32) for a, b in BUCKETS}  # fmt: skip


def test_scores_by_place_become_near_and_far(tmp_path: Path):
    folder = tmp_path / "synthetic"
    write_study(folder, complete=True, plan=plan())
    bits, accuracy = parts(rewritten(folder, of_places))
    assert (bits.name, accuracy.name) == ("places-bits_per_byte", "places-accuracy")
    row = next(row for row in bits.values["rows"] if row["variant"] == "kv-tied")
    assert [at["mean"] for at in row["at"]] == pytest.approx([0.1, 0.1, 0.3], abs=0.01)
    assert row["near"]["mean"] == pytest.approx(0.1, abs=0.01)
    assert row["far_minus_near"]["mean"] == pytest.approx(0.2, abs=0.01)
    (told,) = bits.sentences
    assert "at fewer than 32 bytes before the one that is predicted, and +0.3" in told
    assert "it fares worse far" in told
    (told,) = accuracy.sentences
    assert "it fares worse near" in told
    assert {row["variant"] for row in accuracy.values["rows"]} == {"kv-tied", "gqa-2", "again"}
    for part in (bits, accuracy):
        assert (folder / "report" / f"{part.name}.svg").read_text().count("<circle") >= 9
        assert all(len(table_row) == len(table.columns) for table in part.tables for table_row in table.rows)


def test_the_nearer_half_is_weighted_by_its_places(tmp_path: Path):
    folder = tmp_path / "synthetic"
    write_study(folder, complete=True, plan=plan())

    def scores(task: str, variant: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
        return {f"bits_per_byte@{a}-{b}": 1.0 + (a == 1) * (variant == "kv-tied") for a, b in BUCKETS}

    rows = parts(rewritten(folder, scores))[0].values["rows"]
    near = next(row for row in rows if row["variant"] == "kv-tied")["near"]
    assert near["mean"] == pytest.approx(15 / 31)


def test_a_study_that_asks_for_no_part_has_none(tmp_path: Path):
    write_study(tmp_path / "synthetic", complete=True)
    assert not parts(Summary(Results.load(tmp_path / "synthetic")))
