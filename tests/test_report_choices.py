"""Reports of tuned axes, of controls whose outcome is known, and of what to choose: the same numbers everywhere, and no sentence too bold."""

from __future__ import annotations

import copy
import csv
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from study_fixture import PLAN, set_loss, write_later_runs, write_study
from test_report import Page, by_seed, json_of, page_of, t_interval
from twofold import report
from twofold.report import budgets, choices
from twofold.report.summary import Summary
from twofold.study.results import Results

RATES = {"lr1": 1e-3, "lr4": 4e-3, "lr16": 1.6e-2}
AXIS = {
    "name": "learning rate", "tune": True,
    "points": [{"name": name, "training": {"learning_rate": rate}} for name, rate in RATES.items()],
}  # fmt: skip
AGAIN = {
    "name": "mha-again", "label": "(Q, K, V), other seeds", "kind": "control", "note": "Nothing differs but the seeds.",
    "seed_shift": 1000, "expect": {"variant": "mha", "outcome": "same"},
}  # fmt: skip
WORSE = {
    "name": "none", "label": "(Q, K, V), narrow MLP", "kind": "control", "note": "Known to fail.",
    "model": {"intermediate_size": 16}, "expect": {"variant": "mha", "outcome": "worse"},
}  # fmt: skip


def plan(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(PLAN)
    return values | {"variants": [*values["variants"], AGAIN, WORSE], "tasks": [values["tasks"][0]]} | changes


def written(folder: Path, values: dict[str, Any], losses: dict[str, list[float]]) -> Path:
    """A complete study, each of whose named variants has these losses at the seeds in order."""
    write_study(folder, complete=True, plan=values)
    for variant, by_order in losses.items():
        for seed, loss in enumerate(by_order):
            set_loss(folder, f"bytes/{variant}/seed-{seed}", loss)
    report.write(folder)
    return folder


def markdown(folder: Path) -> str:
    return (folder / "report" / "report.md").read_text()


LOSSES = {
    "mha": [2.00, 2.02, 2.04], "kv-tied": [2.10, 2.12, 2.10], "qk-tied": [2.3, 2.3, 2.3], "one": [2.5, 2.5, 2.5],
    "gqa-2": [2.20, 2.05, 2.16], "mqa": [2.21, 2.22, 2.26], "mha-again": [2.03, 2.00, 2.02], "none": [3.0, 3.1, 3.2],
}  # fmt: skip


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("studies") / "controlled", plan(), LOSSES)


# Controls


def test_a_control_whose_outcome_is_known_is_no_way_to_spend_the_cache(tmp_path: Path):
    """Not even one that caches the least, whose mark would also squeeze all others into a corner of the figure."""
    blind = WORSE | {"name": "blind", "label": "sees no other token", "model": {"window_tokens": [1]}}
    values = plan(variants=[*PLAN["variants"], AGAIN, blind])
    losses = {name: loss for name, loss in LOSSES.items() if name != "none"} | {"blind": [3.0, 3.1, 3.2]}
    found = written(tmp_path / "blind", values, losses)
    (section,) = json_of(found)["sections"]
    variants = {variant["name"]: variant for variant in section["variants"]}
    assert variants["blind"]["cost"] < min(own["cost"] for name, own in variants.items() if name != "blind")
    assert not variants["blind"]["on_front"]
    assert "blind" not in {way["variant"] for budget in section["budgets"] for way in budget["variants"]}
    assert "sees no other token" not in (found / "report" / "frontier.svg").read_text()
    assert "Of these sees no other token is in the table alone" in (found / "report" / "index.html").read_text()
    assert "(Q, K, V), other seeds" in (found / "report" / "frontier.svg").read_text()


def test_controls_that_come_out_are_told_with_their_interval(controlled: Path):
    (section,) = json_of(controlled)["sections"]
    negative, positive = section["controls"]
    assert (negative["outcome"], negative["came_out"]) == ("same", True)
    assert (positive["outcome"], positive["came_out"]) == ("worse", True)
    own, base = (by_seed(controlled, "bytes", name, "bits_per_byte") for name in ("none", "mha"))
    mean, low, high = t_interval([own[seed] - base[seed] for seed in own])
    assert [positive["difference"][name] for name in ("mean", "low", "high")] == pytest.approx([mean, low, high])
    assert negative["text"].startswith(
        "Negative control: (Q, K, V), other seeds must not differ from (Q, K, V). The difference is −0.003 ["
    )
    assert negative["text"].endswith(
        "bits per byte, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}3: zero is inside, as it should be."
    )
    assert "It is worse by +1.08 [+0.88, +1.28] bits per byte, n" in positive["text"]
    page = (controlled / "report" / "index.html").read_text()
    for text in (negative["text"], positive["text"]):
        assert text in page
    told = json_of(controlled)["controls"]
    assert told["failures"] == []
    assert told["tally"] == [
        "Negative controls: zero is outside the interval of 0 of 1; by chance alone that is to be expected of 5% (0.05 of 1).",
        "Positive controls: 1 of 1 came out worse, as they must.",
    ]
    for words in told["tally"]:
        assert words in page
        assert words in markdown(controlled)
    assert "FAILED" not in page + markdown(controlled)
    with (controlled / "report" / "differences.csv").open() as file:
        within = {(row["within"], row["variant"]) for row in csv.DictReader(file)}
    assert {("same", "mha-again"), ("worse", "none")} <= within


def test_a_control_that_fails_is_said_loudly_and_with_its_rate(tmp_path: Path):
    losses = LOSSES | {"mha-again": [2.10, 2.13, 2.14], "none": [2.0, 2.1, 2.0]}
    folder = written(tmp_path / "failed", plan(), losses)
    negative, positive = json_of(folder)["controls"]["failures"]
    assert negative.startswith("Bytes of source text: NEGATIVE CONTROL FAILED: (Q, K, V), other seeds must not differ")
    assert "zero is outside. Of intervals at 95% that is to be expected of 5%, or 1 in 20." in negative
    assert positive.startswith("Bytes of source text: POSITIVE CONTROL FAILED: (Q, K, V), narrow MLP must be worse")
    assert "It is not shown to be worse, so a difference of that kind cannot be seen here." in positive
    page = page_of(folder)
    warnings = [attributes for tag, attributes in page.elements if attributes.get("class") == "warning"]
    assert len(warnings) == 2
    lines = markdown(folder).splitlines()
    assert sum(line.startswith("**Bytes of source text: ") and "CONTROL FAILED" in line for line in lines) == 2


@pytest.mark.parametrize("seeds", [0, 1])
def test_controls_without_two_seeds_have_no_verdict(tmp_path: Path, seeds: int):
    folder = tmp_path / "few"
    write_study(folder, complete=True, plan=plan(seeds=[0]))
    if not seeds:
        shutil.rmtree(folder / "runs")
    report.write(folder)
    told = json_of(folder)
    words = "One seed is done for both: no interval, so no verdict." if seeds else "No seed is done for both."
    for control in told["sections"][0]["controls"]:
        assert control["came_out"] is None
        assert control["text"].endswith(words)
    assert told["controls"]["failures"] == []
    assert told["controls"]["tally"][0].endswith(" 1 without an interval.")


def test_the_same_model_from_other_seeds_is_on_no_front_and_no_choice(tmp_path: Path):
    folder = written(tmp_path / "again", plan(), LOSSES | {"mha-again": [1.0, 1.0, 1.0]})
    (section,) = json_of(folder)["sections"]
    assert "mha-again" not in section["front"]
    assert "mha" in section["front"]
    assert all(entry["variant"] != "mha-again" for budget in section["budgets"] for entry in budget["variants"])


# What to choose


def test_the_best_variant_at_each_budget(controlled: Path):
    (section,) = json_of(controlled)["sections"]
    found = {budget["share_of_reference"]: budget["variants"] for budget in section["budgets"]}
    assert {share: [entry["variant"] for entry in entries][:2] for share, entries in found.items()} == {
        1.0: ["mha", "kv-tied"], 0.5: ["kv-tied", "gqa-2"], 0.25: ["mqa"], 0.125: [],
    }  # fmt: skip
    half = {entry["variant"]: entry["best_in_resamples"] for entry in found[0.5]}
    draws = list(itertools.product(range(3), repeat=3))
    better = sum(sum(LOSSES["gqa-2"][seed] - LOSSES["kv-tied"][seed] for seed in draw) < 0 for draw in draws)
    assert 0 < better < 14
    assert half["gqa-2"] == pytest.approx(better / 27)
    assert sum(half.values()) == pytest.approx(1.0)
    for entries in found.values():
        assert [entry["loss"] for entry in entries] == sorted(entry["loss"] for entry in entries)
        for entry in entries:
            values = by_seed(controlled, "bytes", entry["variant"], "bits_per_byte")
            assert [entry["loss"], entry["low"], entry["high"]] == pytest.approx(
                list(t_interval(list(values.values())))
            )
    _, *rows = page_of(controlled).table("The lowest mean bits per byte within a part of (Q, K, V)’s cache")
    assert [row[0].split("\n")[0] for row in rows] == ["100%", "50%", "25%", "12.5%"]
    assert [row[1] for row in rows] == ["(Q, K, V)", "(Q, K=V)", "MQA", "nothing measured needs so little"]
    assert [row[6] for row in rows] == ["(Q, K=V)", "GQA-2", "–", "–"]
    assert rows[1][2] == "50%"
    assert rows[2][4] == "alone"
    text = markdown(controlled)
    assert "### What to choose" in text
    for row in rows[:3]:
        assert row[3].split()[0] in text
    assert "bootstrap resamples of 3 seeds" in text


def test_one_seed_does_not_say_how_surely(tmp_path: Path):
    folder = tmp_path / "one"
    write_study(folder, complete=True, plan=plan(seeds=[4]))
    report.write(folder)
    assert "Too few seeds are done for all variants to say how surely the first is the best." in markdown(folder)
    _, first, *_ = page_of(folder).table("The lowest mean bits per byte within a part of (Q, K, V)’s cache")
    assert first[4] == "–"


def test_only_text_has_a_choice_of_cache(tmp_path: Path):
    folder = tmp_path / "both"
    write_study(folder, complete=True)
    summary = Summary(Results.load(folder))
    assert [bool(budgets.budgets(summary, section)) for section in summary.sections] == [True, False]


# Tuned axes


TIES = ("mha", "kv-tied", "qk-tied", "one", "gqa-2", "mqa", "mha-again", "none")


def fail(folder: Path, path: str) -> None:
    (folder / "runs" / path / "outcome.json").unlink()
    (folder / "runs" / path / "status.json").write_text('{"status": "failed", "error": "The loss is NaN at step 3."}')


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most are best in the middle, qk-tied at the edge; kv-tied failed there where it is best, "one" everywhere, and mqa has still to choose."""
    folder = tmp_path_factory.mktemp("studies") / "tuned"
    write_study(folder, complete=True, plan=plan(grid=[AXIS]))
    for path in folder.glob("runs/*/*/seed-[12]"):
        shutil.rmtree(path)
    for name in TIES:
        for rate in RATES:
            is_best = rate == ("lr16" if name in ("qk-tied", "kv-tied") else "lr4")
            set_loss(folder, f"bytes-{rate}/{name}/seed-0", 2.0 if is_best else 2.6 if rate == "lr1" else 2.5)
    for path in ("lr16/kv-tied", "lr1/one", "lr4/one", "lr16/one"):
        fail(folder, f"bytes-{path}/seed-0")
    write_later_runs(folder)
    for path in folder.glob("runs/bytes-lr*/mqa/seed-[12]"):
        shutil.rmtree(path)
    shutil.rmtree(folder / "runs" / "bytes-lr1" / "mqa")
    report.write(folder)
    return folder


def test_a_tuned_task_is_one_section_with_each_variant_at_its_own_point(tuned: Path):
    told = json_of(tuned)
    (section,) = told["sections"]
    assert (section["name"], section["title"], section["tasks"]) == ("bytes", "Bytes of source text", ["bytes"])
    chosen = {choice["variant"]: choice["points"].get("learning rate") for choice in section["choices"]}
    assert chosen == {
        "mha": "lr4", "kv-tied": "lr4", "qk-tied": "lr16", "one": None, "gqa-2": "lr4", "mqa": None, "mha-again": "lr4",
        "none": "lr4",
    }  # fmt: skip
    variants = {variant["name"]: variant for variant in section["variants"]}
    for name, point in chosen.items():
        values = by_seed(tuned, f"bytes-{point}", name, "bits_per_byte")
        assert set(values) == ({0, 1, 2} if point else set())
        if point:
            assert [variants[name]["loss"][k] for k in ("mean", "low", "high")] == pytest.approx(
                list(t_interval([*values.values()]))
            )
        assert variants[name]["loss"]["n"] == variants[name]["done"] == len(values)
        assert variants[name]["planned"] == 3
    own, base = (
        by_seed(tuned, "bytes-lr16", "qk-tied", "bits_per_byte"),
        by_seed(tuned, "bytes-lr4", "mha", "bits_per_byte"),
    )
    assert variants["qk-tied"]["difference"]["mean"] == pytest.approx(sum(own[s] - base[s] for s in own) / 3), (
        "paired by seed"
    )
    losses = {choice["variant"]: choice["mean_losses"] for choice in section["choices"]}
    assert losses["kv-tied"] == {"bytes-lr1": pytest.approx(2.6), "bytes-lr4": pytest.approx(2.5), "bytes-lr16": None}


def test_the_page_and_the_text_say_which_point_it_was_and_what_is_missing(tuned: Path):
    head, *rows = page_of(tuned).table("Every variant on Bytes of source text")
    cells = {
        row[0].split("\n")[0].removesuffix(" reference").removesuffix(" control"): row[head.index("Chosen")]
        for row in rows
    }
    assert cells == {
        "(Q, K, V)": "lr4", "(Q, K=V)": "lr4", "(Q=K, V)": "lr16 (edge)", "(Q=K=V)": "none finished", "GQA-2": "lr4",
        "MQA": "open (2 of 3 tuning runs)", "(Q, K, V), other seeds": "lr4", "(Q, K, V), narrow MLP": "lr4",
    }  # fmt: skip
    for text in (markdown(tuned).replace("\\", ""), (tuned / "report" / "index.html").read_text()):
        assert (
            "Each variant is run at its own best learning rate (lr1, lr4, lr16), by the mean held-out loss over seed 0."
            in text
        )
        assert "Seed 0, which chose, is among the results, where the best of 3 flatters each variant a little." in text
        assert "The choice is open for 1 of 8, whose tuning runs have not all ended: MQA." in text
        assert "At no point were all runs done, so there is no choice: (Q=K=V)." in text
        assert "Chosen at the edge, so a better point may lie beyond: (Q=K, V)." in text
        assert "lr16 (edge)" in text
    told = json_of(tuned)["status"]
    assert (told["done"], told["failed"], told["pending"]) == (8 * 3 - 4 - 1 + 6 * 2, 4, 1 + 2)
    assert told["planned"] == sum(told[state] for state in ("done", "failed", "pending"))
    assert not told["is_complete"]


def test_tuning_runs_are_kept_among_the_runs_and_in_no_curve(tuned: Path):
    with (tuned / "report" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    purposes = {(run["task"], run["variant"], run["seed"]): run["purpose"] for run in runs}
    assert purposes["bytes-lr4", "mha", "0"] == purposes["bytes-lr4", "mha", "2"] == "result"
    assert purposes["bytes-lr1", "mha", "0"] == "tuning"
    assert {run["seed_shift"] for run in runs if run["variant"] == "mha-again"} == {"1000"}
    shown = Summary(Results.load(tuned)).shown
    of_mha = shown.curves[shown.curves.variant == "mha"]
    assert set(of_mha.task) == {"bytes"}
    assert len(of_mha[(of_mha.step == 50) & (of_mha.split == "held_out") & (of_mha.metric == "loss")]) == 3
    assert json_of(tuned)["failures"][0]["task"].startswith("bytes-lr")


def test_a_grid_of_tuned_settings_counts_its_choices(tmp_path: Path):
    widths = {
        "name": "width",
        "points": [{"name": f"w{width}", "model": {"hidden_size": width}} for width in range(32, 136, 8)],
    }
    few = [variant for variant in PLAN["variants"] if variant["name"] in ("mha", "kv-tied")]
    folder = tmp_path / "grid"
    write_study(folder, complete=True, plan=plan(variants=few, grid=[widths, AXIS]))
    report.write(folder)
    summary = Summary(Results.load(folder))
    (section,) = summary.sections
    assert len(section.tasks) == 13
    assert all(variant.done == 13 * 3 for variant in section.variants)
    counted = choices.cell(section, "mha")
    assert sum(int(part.rpartition("× ")[2]) for part in counted.split(", ")) == 13
    assert not Page((folder / "report" / "index.html").read_text()).unbalanced


def test_a_tuned_study_before_its_first_run_is_told(tmp_path: Path):
    folder = tmp_path / "empty"
    write_study(folder, complete=True, plan=plan(grid=[AXIS]))
    shutil.rmtree(folder / "runs")
    report.write(folder)
    told = json_of(folder)
    assert (told["status"]["planned"], told["status"]["pending"]) == (8 * (3 + 2), 8 * (3 + 2))
    assert told["sections"][0]["choices"][0]["tuning_runs"] == {"ended": 0, "planned": 3}
    assert "The choice is open for 8 of 8" in markdown(folder)
