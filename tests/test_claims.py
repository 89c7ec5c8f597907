"""Claims: rules judge intervals as they say, numbers are the reports' own, what is missing is not tested, and the page is what the results say."""

from __future__ import annotations

import json
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from docs_pages import ROOT, check_understood, commands
from study_fixture import PLAN, set_loss, write_later_runs, write_study
from twofold import claims, report
from twofold.claims import Kept, controls, page, wording
from twofold.claims.claim import TOPICS, Claim, CountedEvidence, RowEvidence, Rule, StudyEvidence, ValueEvidence, parse
from twofold.claims.counted import counted
from twofold.claims.measured import Measured, Missing, Origin, exact
from twofold.claims.verdict import VERDICTS, counts, judged, power_of
from twofold.cli import app
from twofold.errors import TwofoldError
from twofold.presets import preset
from twofold.study import plan as plans
from twofold.study.plan import StudyPlan
from twofold.study.results import Results
from twofold.study.statistics import Interval, detectable_difference, interval, paired_difference

RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "claims.md"
NAN = math.nan


def between(low: float, high: float, n: int = 3) -> Measured:
    shown = Interval(mean=(low + high) / 2, low=low, high=high, n=n, method="")
    return Measured(what="x", shown=shown, unit="nats", origin=Origin(command="x"))


def claim(*evidence: Any, **changes: Any) -> Claim:
    fields = {"id": "c", "short": "c", "statement": "c", "source": "s", "asked_by": "paper", **changes}
    return Claim.model_validate(fields | {"evidence": [one.model_dump(exclude_defaults=True) for one in evidence]})


# Rules


@pytest.mark.parametrize(
    ("rule", "low", "high", "outcome"),
    [
        ({"above": 0}, 0.1, 0.3, "confirmed"),
        ({"above": 0}, -0.1, 0.3, "undecided"),
        ({"above": 0}, -0.3, -0.1, "refuted"),
        ({"above": 0.99}, 0.5, 0.98, "refuted"),
        ({"below": 0}, -0.3, -0.1, "confirmed"),
        ({"below": 0}, -0.3, 0.1, "undecided"),
        ({"below": 0}, 0.1, 0.3, "refuted"),
        ({"below": 0}, 0.0, 0.0, "refuted"),
        ({"between": (-1, 1)}, -1, 0.5, "confirmed"),
        ({"between": (-1, 1)}, -1.1, 0.5, "undecided"),
        ({"between": (-1, 1)}, 1.1, 1.5, "refuted"),
        ({"between": (-1, 1)}, -3, 3, "undecided"),
        ({"published": 0.2}, 0.1, 0.3, "confirmed"),
        ({"published": 0.2}, -0.1, 0.3, "undecided"),
        ({"published": 0.2}, 0.3, 0.4, "refuted"),
        ({"published": 0.2}, -0.1, 0.1, "refuted"),
        ({"above": 0}, NAN, NAN, "undecided"),
    ],
)
def test_an_interval_is_judged_as_the_rule_says(rule: dict[str, Any], low: float, high: float, outcome: str):
    assert judged(Rule(**rule), between(low, high)) == outcome


def test_perplexities_are_compared_as_lengths_of_code():
    rule = Rule(perplexities=(5.11, 5.27))
    assert rule.size == pytest.approx(100 * (math.log(5.27) - math.log(5.11)) / math.log(5.11))
    assert judged(rule, between(1.0, 3.0)) == "confirmed"
    assert judged(rule, between(2.0, 3.0)) == "refuted"


def test_a_rule_is_exactly_one():
    for wrong in ({}, {"above": 0, "below": 1}):
        with pytest.raises(ValueError, match="exactly one of above, below"):
            Rule(**wrong)


@pytest.mark.parametrize(
    ("lows", "verdict"),
    [
        ([0.1, 0.2], "confirmed at this scale"),
        ([-0.9, -0.8], "refuted at this scale"),
        ([-0.1, -0.1], "undecided"),
        ([0.1, -0.1], "mixed"),
        ([0.1, -0.9], "mixed"),
        ([], "not tested"),
    ],
)
def test_a_verdict_follows_from_all_checks(lows: list[float], verdict: str, tmp_path: Path):
    values = {"name": "x", "rows": [{"mean": low + 0.1, "low": low, "high": low + 0.2, "n": 3} for low in lows]}
    (tmp_path / "v.json").write_text(json.dumps(values))
    evidence = [
        ValueEvidence(file="v.json", at=("rows", str(place)), what="x", command="twofold doctor", above=0.0)
        for place in range(len(lows))
    ]
    judgement = claims.judge(claim(*evidence), Kept(tmp_path))
    assert judgement.verdict == verdict
    assert counts([judgement])[verdict] == 1
    assert sum(counts([judgement]).values()) == 1


def test_a_verdict_on_a_part_of_the_evidence_says_so(tmp_path: Path):
    (tmp_path / "v.json").write_text(json.dumps({"x": {"mean": 1, "low": 0.5, "high": 1.5, "n": 3}}))
    there = ValueEvidence(file="v.json", at=("x",), what="x", command="twofold doctor", above=0.0)
    missing = StudyEvidence(study="nowhere", variant="kv", above=0.0)
    judgement = claims.judge(claim(there, missing, missing, topic="language"), Kept(tmp_path))
    assert (judgement.verdict, judgement.is_partial, len(judgement.missing)) == ("confirmed at this scale", True, 1)
    text = page.text([judgement], Kept(tmp_path), tmp_path / "claims.md")
    assert "**confirmed at this scale**, in part |" in text
    assert "by a part of the evidence" in text
    whole = claims.judge(claim(there, topic="language"), Kept(tmp_path))
    assert not whole.is_partial
    assert "in part |" not in page.text([whole], Kept(tmp_path), tmp_path / "claims.md")


def test_power_is_that_of_the_paired_test():
    values = np.random.default_rng(0).normal(size=5)
    assert power_of(interval(list(values))) == pytest.approx(detectable_difference(values.std(ddof=1), 5))
    assert math.isnan(power_of(interval([1.0])))
    assert power_of(interval([1.0, 1.0, 1.0])) == 0


# What is read of results


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kept, Results]:
    """Three studies that were not run: one whole, one under way, and one whose grid is shown together, with controls."""
    root = tmp_path_factory.mktemp("kept")
    length = {"name": "length", "points": [{"name": f"T{n}", "options": {"context": 32 + n}} for n in range(13)]}
    again = {
        "name": "again", "kind": "control", "note": "The reference again.", "seed_shift": 1000,
        "expect": {"variant": "mha", "outcome": "same"},
    }  # fmt: skip
    worse = {
        "name": "worse", "kind": "control", "note": "It fails.", "model": {"tie": "(Q=K=V)"},
        "expect": {"variant": "mha", "outcome": "worse"},
    }  # fmt: skip
    grid = {
        **PLAN,
        "name": "grid",
        "grid": [length],
        "tasks": PLAN["tasks"][:1],
        "variants": [*PLAN["variants"][:3], again, worse],
    }
    for name, plan, complete in (("whole", PLAN, True), ("half", PLAN, False), ("grid", grid, True)):
        folder = root / "studies" / name
        write_study(folder, complete=complete, plan={**plan, "name": name})
        report.write(folder)
        (root / "results").mkdir(exist_ok=True)
        (folder / "report").rename(root / "results" / name)
    return Kept(root / "results"), Results.load(root / "studies" / "whole")


def only(kept: Kept, **evidence: Any) -> Measured:
    found = kept.measure(StudyEvidence(**{"above": 0, "study": "whole", **evidence}))
    assert not isinstance(found, Missing), found
    (measured,) = found
    return measured


def test_a_difference_is_the_reports_own(kept: tuple[Kept, Results]):
    folder, results = kept
    own, reference = (results.by_seed("bytes", name, "bits_per_byte") for name in ("kv-tied", "mha"))
    wanted = paired_difference(own, reference)
    measured = only(folder, section="bytes", variant="kv-tied")
    assert (measured.shown.mean, measured.shown.low, measured.shown.n) == (wanted.mean, wanted.low, 3)
    assert measured.unit == "bits per byte"
    assert measured.what == "Bytes of source text: (Q, K=V) against (Q, K, V)"
    relative = only(folder, section="bytes", variant="kv-tied", measure="relative loss difference")
    assert relative.shown.high == pytest.approx(100 * wanted.high / np.mean(list(reference.values())))
    assert (measured.origin.command, measured.origin.page) == ("twofold study run synthetic", "whole/report.md")
    assert measured.origin.code == "0000000000 (sources cccccccccccc)"
    assert measured.origin.data == "d" * 12
    assert not measured.origin.state


def test_a_pair_that_the_report_lacks_is_paired_by_seed(kept: tuple[Kept, Results]):
    folder, results = kept
    values = {name: results.by_seed("bytes", name, "bits_per_byte") for name in ("kv-tied", "qk-tied", "gqa-2")}
    found = only(folder, section="bytes", variant="qk-tied", against="kv-tied").shown
    wanted = paired_difference(values["qk-tied"], values["kv-tied"])
    assert (found.mean, found.low) == pytest.approx((wanted.mean, wanted.low))
    # One that it has, either way round.
    one = only(folder, section="bytes", variant="gqa-2", against="kv-tied").shown
    other = only(folder, section="bytes", variant="kv-tied", against="gqa-2").shown
    wanted = paired_difference(values["gqa-2"], values["kv-tied"])
    assert (one.low, one.high) == pytest.approx((wanted.low, wanted.high))
    assert (other.low, other.high) == pytest.approx((-wanted.high, -wanted.low))


def test_scores_and_other_metrics(kept: tuple[Kept, Results]):
    folder, results = kept
    own, reference = (results.by_seed("recall", name, "accuracy") for name in ("one", "mha"))
    score = only(folder, section="recall", variant="one", measure="score")
    assert score.shown.mean == pytest.approx(np.mean(list(own.values())))
    assert (score.unit, score.is_difference) == ("accuracy", False)
    difference = only(folder, section="recall", variant="one", measure="score difference").shown
    assert difference.high == pytest.approx(paired_difference(own, reference).high)
    by_metric = only(folder, section="recall", variant="one", measure="score difference", metric="accuracy").shown
    assert by_metric.low == pytest.approx(difference.low)
    mean = only(folder, section="recall", variant="one", measure="score", metric="loss").shown
    assert mean.mean == pytest.approx(np.mean(list(results.by_seed("recall", "one", "loss").values())))
    ratio = only(folder, section="recall", variant="kv-tied", measure="cache ratio")
    assert (ratio.shown.mean, ratio.is_exact) == (0.5, True)


def test_every_section_that_fits_is_a_check(kept: tuple[Kept, Results]):
    found = kept[0].measure(StudyEvidence(study="whole", variant="one", above=0))
    assert not isinstance(found, Missing)
    assert [measured.what.split(":")[0] for measured in found] == ["Bytes of source text", "Associative recall"]


def test_the_points_of_a_grid_that_is_shown_together(kept: tuple[Kept, Results]):
    folder, _ = kept
    results = Results.load(folder.folder.parent / "studies" / "grid")
    whole = only(folder, study="grid", section="bytes", variant="kv-tied")
    point = only(folder, study="grid", section="bytes-T3", variant="kv-tied")
    assert point.what.startswith("Bytes of source text, T3: ")
    own, reference = (results.by_seed("bytes-T3", name, "bits_per_byte") for name in ("kv-tied", "mha"))
    assert point.shown.low == pytest.approx(paired_difference(own, reference).low)
    relative = only(folder, study="grid", section="bytes-T3", variant="kv-tied", measure="relative loss difference")
    assert relative.shown.low == pytest.approx(100 * point.shown.low / np.mean(list(reference.values())))
    # Of the whole grid a pair is paired from runs.csv by the same rule as the report's own numbers.
    pair = only(
        folder, study="grid", section="bytes", variant="kv-tied", metric="bits_per_byte", measure="score difference"
    )
    assert pair.shown.low == pytest.approx(whole.shown.low)
    growth = only(folder, study="grid", section="bytes-T3", minus="bytes-T1", variant="kv-tied")
    before = [results.by_seed("bytes-T1", name, "bits_per_byte") for name in ("kv-tied", "mha")]
    here, there = ({seed: a[seed] - b[seed] for seed in a} for a, b in ((own, reference), tuple(before)))
    assert growth.shown.low == pytest.approx(paired_difference(here, there).low)
    assert growth.what.endswith("minus that on bytes-T1")


def test_of_a_tuned_axis_a_variant_is_read_at_its_chosen_point(tmp_path: Path):
    points = [{"name": f"lr{rate}", "training": {"learning_rate": rate}} for rate in (0.001, 0.002, 0.004)]
    rates = {"name": "learning rate", "tune": True, "points": points}
    write_study(tmp_path / "s", complete=True, plan={**PLAN, "name": "s", "grid": [rates]})
    # A point at which two variants are not chosen alike; else the test would not tell points apart.
    set_loss(tmp_path / "s", "bytes-lr0.001/kv-tied/seed-0", 0.1)
    set_loss(tmp_path / "s", "bytes-lr0.004/qk-tied/seed-0", 0.1)
    write_later_runs(tmp_path / "s")
    report.write(tmp_path / "s")
    (tmp_path / "results").mkdir()
    (tmp_path / "s" / "report").rename(tmp_path / "results" / "s")
    results = Results.load(tmp_path / "s")
    chosen = {variant: choice.task for (setting, variant), choice in results.choices.items() if setting == "bytes"}
    assert (chosen["kv-tied"], chosen["qk-tied"]) == ("bytes-lr0.001", "bytes-lr0.004")
    own, other = (results.by_seed(str(chosen[name]), name, "bits_per_byte") for name in ("qk-tied", "kv-tied"))
    wanted = paired_difference(own, other)
    assert wanted.n == 3
    found = only(Kept(tmp_path / "results"), study="s", section="bytes", variant="qk-tied", against="kv-tied").shown
    assert (found.low, found.high, found.n) == pytest.approx((wanted.low, wanted.high, 3))


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (StudyEvidence(study="nowhere", variant="kv-tied", above=0), "no result of the study nowhere"),
        (StudyEvidence(study="whole", section="bites", variant="kv-tied", above=0), "no task 'bites'"),
        (StudyEvidence(study="whole", section="bytes", variant="tied", above=0), "not measured tied on 'bytes'"),
        (StudyEvidence(study="whole", variant="one", metric="recall@4", measure="score", above=0), "not measured one"),
        (StudyEvidence(study="whole", section="bytes", minus="no", variant="one", above=0), "not measured one"),
        (RowEvidence(benchmark="step", row="x", above=0), "no result of the benchmark step"),
        (ValueEvidence(file="a.json", at=("x",), what="x", command="c", above=0), "a.json is not kept"),
        (ValueEvidence(file="whole/report.json", at=("sections", "9", "x"), what="x", command="c", above=0), "has no"),
        (ValueEvidence(file="whole/report.json", at=("study", "x"), what="x", command="c", above=0), "has no study.x"),
    ],
)
def test_what_is_missing_is_not_tested_and_its_command_is_named(evidence: Any, reason: str, kept: tuple[Kept, Results]):
    judgement = claims.judge(claim(evidence), kept[0])
    assert judgement.verdict == "not tested"
    ((told, command),) = judgement.missing
    assert reason in told
    assert judgement.commands == (command,)
    assert command == evidence.command


def test_a_study_under_way_is_said_to_be(kept: tuple[Kept, Results]):
    measured = only(kept[0], study="half", section="bytes", variant="kv-tied")
    assert measured.shown.n == 2
    assert "still to come" in measured.origin.state


def test_rows_and_values(tmp_path: Path):
    (tmp_path / "step.json").write_text(json.dumps([{"name": "a / b", "value": 0.5, "unit": "ratio"}]))
    kept = Kept(tmp_path)
    (row,) = kept.measure(RowEvidence(benchmark="step", row="a / b", below=1))  # type: ignore[misc]
    assert (row.shown, row.is_exact, row.origin.command) == (
        exact(0.5, "measured once"),
        True,
        "python benchmarks/step.py --json > docs/results/step.json",
    )
    limit = {"value": 0.2, "low": 0.1, "high": 0.3}
    (tmp_path / "law.json").write_text(
        json.dumps({"laws": [{"variant": "kv", "limits": [{"value": 9}, limit]}], "k": 2})
    )

    def value(*at: str) -> Any:
        found = kept.measure(ValueEvidence(file="law.json", at=at, what="x", command="c", above=0))
        return found if isinstance(found, Missing) else found[0]

    assert value("laws", "kv", "limits", "-1").shown.high == 0.3
    assert wording.result(value("laws", "kv", "limits", "1")) == "+0.20 [+0.10, +0.30]"
    assert math.isnan(power_of(value("laws", "kv", "limits", "-1").shown))
    assert value("k").is_exact
    assert isinstance(value("laws", "kv", "limits", "7"), Missing)


def test_a_value_that_its_own_file_doubts_decides_nothing(tmp_path: Path):
    law = {"limit": {"value": 0.7, "low": 0.6, "high": 0.8}, "is_pinned": True, "is_misfit": False}
    doubts = [
        {"at": ("is_pinned",), "says": "a guess"},
        {"at": ("is_misfit",), "says": "no fit"},
        {"at": ("no", "way"), "says": "?"},
    ]
    one = claim(
        ValueEvidence(file="l.json", at=("limit",), what="x", command="c", above=0, doubts=doubts), topic="scale"
    )  # type: ignore[arg-type]
    (tmp_path / "l.json").write_text(json.dumps(law))
    judgement = claims.judge(one, Kept(tmp_path))
    assert (judgement.verdict, judgement.checks[0].measured.doubt) == ("undecided", "a guess")
    assert "| undecided: a guess |" in page.text([judgement], Kept(tmp_path), tmp_path / "claims.md")
    (tmp_path / "l.json").write_text(json.dumps(law | {"is_pinned": False}))
    assert claims.judge(one, Kept(tmp_path)).verdict == "confirmed at this scale"


def test_two_guessers_confirm_nothing(kept: tuple[Kept, Results], tmp_path: Path):
    """Two ties that have not learnt a task differ by nothing: that is no evidence that one does what the other does."""
    values = json.loads((kept[0].folder / "whole" / "report.json").read_text())
    (tmp_path / "whole").mkdir()
    evidence = StudyEvidence(
        study="whole", section="recall", variant="one", measure="score difference", between=(-1.0, 1.0)
    )
    for at_chance, outcome in ((["mha", "one"], "undecided"), (["one"], "confirmed"), ([], "confirmed")):
        values["sections"][1]["chance"] = {"level": 0.4, "examples": 500, "at_chance": at_chance, "uneven": []}
        (tmp_path / "whole" / "report.json").write_text(json.dumps(values))
        (check,) = claims.judge(claim(evidence), Kept(tmp_path)).checks
        assert check.outcome == outcome
        assert bool(check.measured.doubt) == (outcome == "undecided")


def test_what_was_measured_once_is_not_called_free_of_chance(tmp_path: Path):
    (tmp_path / "step.json").write_text(json.dumps([{"name": "a / b", "value": 0.5, "unit": "ratio"}]))
    once = RowEvidence(benchmark="step", row="a / b", below=1)
    sure = CountedEvidence(preset="paper-300m", model={"tie": "(Q, K=V)"}, quantity="cached tensors", between=(1, 1))
    checks = claims.judge(claim(once, sure), Kept(tmp_path)).checks
    assert [wording.power(check) for check in checks] == ["measured once", "no chance in it"]


def test_what_follows_from_sizes_is_counted():
    half = CountedEvidence(preset="paper-300m", model={"tie": "(Q, K=V)"}, against={}, quantity="cache bytes", below=1)
    assert counted(half)[1:] == (0.5, "ratio")
    model = preset("paper-300m")
    whole = CountedEvidence(preset="paper-300m", model={}, quantity="cache bytes", tokens=7, below=1)
    assert counted(whole)[1] == 2 * 2 * 7 * model.num_hidden_layers * model.num_attention_heads * model.head_dim
    for tie, tensors in (("(Q, K=V)", 1), ("(Q=K, V)", 2), ("V = Q - K", 2)):
        one = CountedEvidence(preset="paper-300m", model={"tie": tie}, quantity="cached tensors", below=3)
        assert counted(one)[1] == tensors


# Controls


def test_controls_are_counted_over_all_studies(kept: tuple[Kept, Results]):
    found = controls.controls(kept[0])
    # One negative and one positive control in the one section of the one study that has any.
    assert [(control.study, control.outcome) for control in found] == [("grid", "same"), ("grid", "worse")]
    for control in found:
        low, high = control.measured.shown.low, control.measured.shown.high
        assert control.holds == (low > 0 if control.outcome == "worse" else low <= 0 <= high)
    text = page.text([], kept[0], Path("claims.md"))
    held = sum(control.holds for control in found if control.outcome == "same")
    assert f"{held} of 1 intervals straddle zero" in text


def test_a_result_beside_a_control_that_failed_says_so(kept: tuple[Kept, Results], tmp_path: Path):
    folder, _ = kept
    report_values = json.loads((folder.folder / "grid" / "report.json").read_text())
    (tmp_path / "grid").mkdir()
    for came_out, words in ((False, "not as promised on Bytes of source text: the control"), (True, "")):
        for control in report_values["sections"][0]["controls"]:
            control["came_out"] = came_out
        (tmp_path / "grid" / "report.json").write_text(json.dumps(report_values))
        caution = only(Kept(tmp_path), study="grid", section="bytes", variant="kv-tied").origin.caution
        assert caution.startswith(words)
        assert bool(caution) == bool(words)


def test_how_likely_so_few_negative_controls_are():
    assert controls.likelihood(20, 20) == 1
    assert controls.likelihood(19, 20) == pytest.approx(1 - 0.95**20)
    assert controls.likelihood(10, 20) < 1e-6


# The claims themselves


EVIDENCE = [(one.id, evidence) for one in claims.load() for evidence in one.evidence]
OF_STUDIES = [(name, evidence) for name, evidence in EVIDENCE if isinstance(evidence, StudyEvidence)]


def sections_of(plan: StudyPlan, pattern: str) -> list[Any]:
    def names(task: Any) -> set[str]:
        return {task.name, task.group, task.setting}

    return [task for task in plan.planned_tasks if any(fnmatchcase(name, pattern) for name in names(task))]


@pytest.mark.parametrize(("name", "evidence"), OF_STUDIES, ids=lambda part: part if isinstance(part, str) else "")
def test_evidence_points_at_what_a_study_plans(name: str, evidence: StudyEvidence):
    assert evidence.study in plans.names()
    plan = plans.builtin(evidence.study)
    planned = sections_of(plan, evidence.section)
    assert planned, f"{evidence.study} has no task {evidence.section}"
    both = {evidence.variant, evidence.against or plan.reference}
    assert any(both <= set(task.variants) for task in planned), (
        f"{evidence.study} does not plan {both} on {evidence.section}"
    )
    if evidence.minus:
        assert any(both <= set(task.variants) for task in sections_of(plan, evidence.minus))
    known = {word for task in plan.planned_tasks for word in (task.name, task.group, *task.points.values())}
    assert set(evidence.only) <= known


def test_evidence_of_a_benchmark_is_a_row_that_it_prints():
    rows = [evidence for _, evidence in EVIDENCE if isinstance(evidence, RowEvidence)]
    assert rows
    for evidence in rows:
        assert (ROOT / "benchmarks" / f"{evidence.benchmark}.py").exists()
        kept = RESULTS / f"{evidence.benchmark}.json"
        if kept.exists():
            assert evidence.row in {row["name"] for row in json.loads(kept.read_text())}
    assert sum((RESULTS / f"{evidence.benchmark}.json").exists() for evidence in rows) > 5


def test_every_command_is_understood():
    lines = [evidence.command for _, evidence in EVIDENCE] + [one.test for one in claims.load() if one.test]
    ours = [arguments for line in dict.fromkeys(lines) for arguments in commands(line)]
    assert len(ours) > 15
    for arguments in ours:
        check_understood(arguments)


def test_every_claim_is_told_whole():
    every = claims.load()
    assert {one.topic for one in every} == set(TOPICS)
    assert {one.asked_by for one in every} == set(page.ASKED)
    for one in every:
        assert one.statement[-1] in ".?”"
        assert one.note == "" or one.note.endswith(".")
    untested = [one.id for one in every if not one.evidence and not one.test]
    assert all(name.startswith(("convert-", "state-space")) for name in untested), untested


# The page


def test_the_page_is_what_the_results_say():
    kept = Kept(RESULTS)
    judgements = [claims.judge(one, kept) for one in claims.load()]
    assert PAGE.read_text() == page.text(judgements, kept, PAGE), "run `twofold claims --markdown docs/claims.md`"


def test_a_page_that_says_anything_else_is_noticed(kept: tuple[Kept, Results]):
    folder, _ = kept
    one = claim(StudyEvidence(study="whole", section="bytes", variant="kv-tied", above=0), id="here", topic="language")
    two = claim(RowEvidence(benchmark="step", row="x", above=0), id="there", topic="cache")
    judgements = [claims.judge(one, folder), claims.judge(two, folder)]
    text = page.text(judgements, folder, folder.folder.parent / "claims.md")
    assert text == page.text(judgements, folder, folder.folder.parent / "claims.md")
    assert "[whole](results/whole/report.md)" in text
    assert f"**{judgements[0].verdict}**" in text
    assert "| **not tested** | no result is kept; the command that would test it is named | 1 | 0 | 0 | 1 |" in text
    assert "`python benchmarks/step.py --json > docs/results/step.json`" in text
    path = folder.folder / "whole" / "report.json"
    before = path.read_text()
    try:
        path.write_text(re.sub(r'"mean": (-?)', r'"mean": \g<1>9', before))
        assert page.text([claims.judge(one, Kept(folder.folder))], folder, PAGE) != text
    finally:
        path.write_text(before)


# The command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["claims", *arguments], prog_name="twofold")


def test_the_command_lists_and_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    listed = invoke()
    assert listed.exit_code == 0, listed.output
    for one in claims.load():
        assert one.id in listed.stdout
    shown = " ".join(invoke("cache-half").stdout.split())
    for words in (
        "halves the cache",
        "paper, table",
        "confirmed if between 0.4900 and 0.5100",
        "memory.json",
        "benchmarks/memory.py",
    ):
        assert words in shown
    told = json.loads(invoke("--json").stdout)
    assert sum(told["counts"].values()) == len(told["claims"]) == len(claims.load())
    assert set(told["counts"]) == set(VERDICTS)
    one = json.loads(invoke("cache-half", "--json").stdout)["claims"][0]
    assert one["verdict"] == "confirmed at this scale"
    assert one["checks"][0]["shown"]["mean"] == pytest.approx(0.5, abs=0.01)


def test_without_results_everything_that_needs_them_is_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told = json.loads(invoke("--json").stdout)
    needing = {one.id for one in claims.load() if not any(isinstance(e, CountedEvidence) for e in one.evidence)}
    assert {one["id"] for one in told["claims"] if one["verdict"] == "not tested"} == needing
    assert "no studies' reports in docs/results" in " ".join(invoke().stdout.split())


def test_the_page_is_written_by_the_command(tmp_path: Path):
    done = invoke("--results", str(RESULTS), "--markdown", str(tmp_path / "claims.md"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "claims.md").read_text().startswith("# Claims, one by one\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache-hlaf"], "did you mean 'cache-half'?"),
        (["♜"], "`twofold claims` lists them."),
        (["--results", "nowhere"], "There is no folder nowhere: give the one that holds"),
        (["cache-half", "--markdown", "x.md"], "leave the id out"),
        (
            ["--markdown", "no/folder/x.md"],
            "no/folder/x.md cannot be written (No such file or directory): give another",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("file", "content", "evidence", "words"),
    [
        ("s/report.json", "{", {"study": "s", "variant": "x"}, "report.json cannot be read as JSON"),
        ("s/report.json", "[]", {"study": "s", "variant": "x"}, "is not a study's report: make it again"),
        (
            "s/report.json",
            '{"study": "s", "sections": [{}], "status": {}, "commands": {}, "provenance": {}}',
            {"study": "s", "variant": "x"},
            "is not a report that this version reads",
        ),
        ("b.json", '{"a": 1}', {"benchmark": "b", "row": "x"}, "holds no rows of a benchmark"),
        (
            "v.json",
            '{"a": "b"}',
            {"file": "v.json", "at": ["a"], "what": "x", "command": "c"},
            "holds neither a number",
        ),
    ],
)
def test_a_result_that_cannot_be_read_is_refused(
    file: str, content: str, evidence: dict[str, Any], words: str, tmp_path: Path
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    one = Claim.model_validate({**claim().model_dump(), "evidence": [{**evidence, "above": 0}]})
    with pytest.raises(TwofoldError, match=words):
        claims.judge(one, Kept(tmp_path))


def test_runs_that_cannot_be_read_are_refused(kept: tuple[Kept, Results], tmp_path: Path):
    folder, _ = kept
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "report.json").write_text((folder.folder / "whole" / "report.json").read_text())
    pair = StudyEvidence(study="whole", section="bytes", variant="qk-tied", against="kv-tied", above=0)
    with pytest.raises(TwofoldError, match=r"runs.csv cannot be read .*: make the report again"):
        Kept(tmp_path).measure(pair)
    (tmp_path / "whole" / "runs.csv").write_text("task,variant,seed\n")
    with pytest.raises(TwofoldError, match=r"runs.csv has no column status"):
        Kept(tmp_path).measure(pair)


GOOD = '[[claims]]\nid = "a"\nshort = "a"\nstatement = "a."\nsource = "s"\nasked_by = "paper"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[claims", "x.toml is not TOML"),
        ("title = 1\n" + GOOD, "x.toml holds title, but only"),
        (GOOD.replace('"a"', '"A b"', 1), "the claim 'A b' is wrong at id: String should match"),
        (GOOD + '[[claims.evidence]]\nstudy = "s"\nvariant = "v"\n', "exactly one of above"),
        (GOOD + "[[claims.evidence]]\nabove = 1\n", "the claim 'a' is wrong at evidence.0"),
        (GOOD + 'test = "x"\n[[claims.evidence]]\nstudy = "s"\nvariant = "v"\nabove = 0\n', "leave test out"),
    ],
)
def test_a_claim_that_is_none_is_refused(text: str, words: str):
    assert len(parse(GOOD, "x.toml")) == 1
    with pytest.raises(TwofoldError, match=words):
        parse(text, "x.toml")
