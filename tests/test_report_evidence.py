"""Chance, standard errors and power: against simulations, in the report's every form, and quoted on a page."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from study_fixture import write_study
from twofold import report
from twofold.report.evidence import evidence, is_at_chance, power_statement, sentences
from twofold.report.summary import Summary
from twofold.study.record import StudyRecord
from twofold.study.results import Results
from twofold.study.statistics import Interval, detectable_difference, interval, paired_difference, share_error

QUOTE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "quote.py"))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_detectable_difference_is_seen_in_eight_of_ten_studies(n):
    """Simulated studies, read with the interval that the report shows."""
    true = detectable_difference(0.03, n)
    drawn = np.random.default_rng(n).normal(true, 0.03, size=(20_000, n))
    half = stats.t.ppf(0.975, n - 1) * drawn.std(axis=1, ddof=1) / math.sqrt(n)
    seen = np.abs(drawn.mean(axis=1)) > half
    assert seen.mean() == pytest.approx(0.8, abs=5 * 0.4 / math.sqrt(20_000))
    one = paired_difference(dict(enumerate(drawn[0])), dict.fromkeys(range(n), 0.0))
    assert one.excludes_zero == seen[0]


def test_more_seeds_less_spread_and_less_power_asked_for_show_smaller_differences():
    assert detectable_difference(0.01, 5) < detectable_difference(0.01, 3) < detectable_difference(0.02, 3)
    assert detectable_difference(0.01, 5, power=0.5) < detectable_difference(0.01, 5)
    assert detectable_difference(0.01, 400) == pytest.approx(2.80 * 0.01 / 20, rel=0.01)
    assert math.isnan(detectable_difference(0.01, 1))
    assert math.isnan(detectable_difference(math.nan, 3))


def test_the_error_of_a_share_is_that_of_shares_drawn_again():
    drawn = np.random.default_rng(0).binomial(500, 0.3, size=20_000) / 500
    assert share_error(0.3, 500) == pytest.approx(drawn.std(), rel=0.03)
    assert math.isnan(share_error(0.3, 0))
    # Several answers in an example that are right or wrong together vary as much, others less: it is an upper bound.
    assert share_error(0.3, 500) > (np.random.default_rng(0).binomial(2_000, 0.3, size=20_000) / 2_000).std()


def shown(mean: float, half: float = 0.01) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, n=3, method="")


def test_a_score_is_told_from_chance_by_examples():
    assert not is_at_chance(shown(0.6), 0.5, 500)
    assert is_at_chance(shown(0.53), 0.5, 500)  # 1.96 · 0.0224 = 0.044
    assert not is_at_chance(shown(0.53), 0.5, 5_000)
    assert is_at_chance(shown(0.2), 0.5, 500)
    assert not is_at_chance(Interval(mean=0.9, low=math.nan, high=math.nan, n=1, method=""), 0.5, 500)
    # Nobody knows of the examples: the seeds decide.
    assert not is_at_chance(shown(0.53), 0.5, 0)
    assert is_at_chance(shown(0.53, half=0.1), 0.5, 0)
    assert is_at_chance(shown(0.4), 0.5, 0)


def test_guesses_are_at_chance_and_one_seed_of_three_that_learnt_is_not():
    """What three guessers have on one held-out set is called chance as often as is said; a mean that no guesses give is not, however far seeds are apart."""
    draws = np.random.default_rng(0)
    guesses = draws.binomial(500, 0.2, size=2_000) / 500  # the same guess in all seeds: the mean varies as much as one
    assert np.mean([is_at_chance(shown(mean), 0.2, 500) for mean in guesses]) == pytest.approx(0.975, abs=0.02)
    learnt = interval([0.19, 0.21, 0.9])
    assert learnt.low < 0.2
    assert not is_at_chance(learnt, 0.2, 500)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores about 0.4 at a chance of 0.3, but for one variant at 0.3, and one of which a single seed is above it; 2,000 examples."""
    folder = tmp_path_factory.mktemp("evidence")
    write_study(folder, complete=True)
    told = json.loads((folder / "study.json").read_text())
    told["tasks"]["recall"] |= {"chance": 0.3, "held_out_size": 2_000}
    (folder / "study.json").write_text(json.dumps(told))
    for seed in (0, 1, 2):
        file = folder / "runs" / "recall" / "one" / f"seed-{seed}" / "outcome.json"
        outcome = json.loads(file.read_text())
        outcome["scores"]["accuracy"] = 0.3 + 0.002 * (seed - 1)
        file.write_text(json.dumps(outcome))
    file = folder / "runs" / "recall" / "kv-tied" / "seed-2" / "outcome.json"
    outcome = json.loads(file.read_text())
    outcome["scores"]["accuracy"] = 0.9
    file.write_text(json.dumps(outcome))
    return folder


def test_the_report_says_chance_error_power_and_who_is_at_chance(study: Path):
    summary = Summary(Results.load(study))
    text, recall = summary.sections
    assert evidence(summary, text) is None  # bits per byte have no chance level
    found = evidence(summary, recall)
    assert found is not None
    scores = {v.name: summary.by_seed("recall", v.name, "accuracy") for v in recall.variants}
    means = {name: sum(values.values()) / 3 for name, values in scores.items()}
    assert min(mean for name, mean in means.items() if name != "one") > 0.35
    assert [variant.name for variant in found.at_chance] == ["one"]
    assert [variant.name for variant in found.uneven] == ["kv-tied"]
    assert found.largest_error == pytest.approx(max(math.sqrt(p * (1 - p) / 2_000) for p in means.values()))
    wanted = []
    for name in set(scores) - {"mha"}:
        differences = [scores[name][seed] - scores["mha"][seed] for seed in (0, 1, 2)]
        wanted.append(detectable_difference(float(np.std(differences, ddof=1)), 3))
    assert found.detectable == pytest.approx((min(wanted), max(wanted)))
    said = sentences(summary, recall)
    assert said[0].startswith("Chance is 0.300 accuracy")
    assert "2,000 held-out examples" in said[1]
    assert "With 3 seeds a true difference of" in said[2]
    assert said[3] == "At chance: no information: (Q=K=V)."
    assert said[4] == "Above chance on average, by seeds so different that their interval holds it: (Q, K=V)."


def test_every_form_of_the_report_holds_it_and_a_page_quotes_it(study: Path, tmp_path: Path):
    files = {path.name: path for path in report.write(study)}
    said = json.loads(files["report.json"].read_text())["sections"][1]["evidence"]
    assert len(said) == 5
    chance = json.loads(files["report.json"].read_text())["sections"][1]["chance"]
    assert chance == {"level": 0.3, "examples": 2_000, "at_chance": ["one"], "uneven": ["kv-tied"]}
    assert "At chance: no information: (Q=K=V)." in files["index.html"].read_text()
    assert "At chance: no information: (Q=K=V)." in files["report.md"].read_text()
    (tmp_path / "docs" / "results").mkdir(parents=True)
    QUOTE["take"](study, tmp_path)
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- scores: synthetic -->\n<!-- end -->\n<!-- scores: nowhere -->\n<!-- end -->\n")
    text = QUOTE["quoted"](page, tmp_path)
    assert "- At chance: no information: (Q=K=V)." in text
    assert "| (Q, K=V) | 0." in text
    assert "Not run yet" in text.partition("nowhere")[2]


def test_what_the_harness_said_is_quoted(tmp_path: Path):
    row = {
        "task": "sums", "metric": "exact_match", "label": "(Q, K=V)", "score": 0.51, "low": 0.48, "high": 0.54, "standard_error": 0.02,
        "chance": 0.5, "difference": -0.1, "difference_low": -0.2, "difference_high": 0.0, "detectable": None, "at_chance": True,
    }  # fmt: skip
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "asked-harness.json").write_text(json.dumps({"rows": [row]}))
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- harness: asked -->\n<!-- end -->\n")
    assert "| sums, exact\\_match | (Q, K=V) | 0.510 \\[0.480, 0.540\\] | 0.020 | 0.500 | −0.10 \\[−0.20, +0.00\\] | – | At chance: no information |" in QUOTE["quoted"](page, tmp_path)  # fmt: skip


def test_a_folder_of_before_has_no_chance_and_loads(study: Path, tmp_path: Path):
    told = json.loads((study / "study.json").read_text())
    for facts in told["tasks"].values():
        del facts["chance"], facts["held_out_size"]
    (tmp_path / "study.json").write_text(json.dumps(told))
    record = StudyRecord.read(tmp_path)
    assert {facts.chance for facts in record.tasks.values()} == {None}
    summary = Summary(Results.load(tmp_path))
    assert all(sentences(summary, section) == [] for section in summary.sections)


def test_where_no_seeds_differ_no_power_is_claimed():
    assert "nothing can be said" in power_statement((math.nan, math.nan), 3, "(Q, K, V)")
    assert "of 0.020 from (Q, K, V)" in power_statement((0.0201, 0.0202), 3, "(Q, K, V)")
