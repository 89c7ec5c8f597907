"""The report's numbers against computations of their own, at every moment of a study, and what must hold of its files."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import shutil
import statistics as plain_statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from study_fixture import PLAN, write_study
from twofold import report
from twofold.errors import TwofoldError
from twofold.report.curves import curves
from twofold.report.summary import MAX_SINGLE_TASKS, Summary
from twofold.study.results import Results
from twofold.study.statistics import interval, pareto_front

VOID = {"meta", "link", "br", "img", "input", "hr"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


class Page(HTMLParser):
    """What a test asks of a page: elements with their attributes, and each table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[dict] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self._cell: list[str] | None = None
        self._caption = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "br" and self._cell is not None:
            self._cell.append("\n")
        elif tag == "caption":
            self._caption = True

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.unbalanced.append(tag)
        else:
            self.open.pop()
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("".join(self._cell).strip())
            self._cell = None
        elif tag == "caption":
            self._caption = False

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)
        if self._caption:
            self.tables[-1]["caption"] += data

    def table(self, caption: str) -> list[list[str]]:
        return next(table["rows"] for table in self.tables if table["caption"] == caption)


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def numbers(text: str) -> list[float]:
    return [number(found) for found in re.findall(r"[-+−]?[\d,]*\.?\d+", text)]


def last_digit(text: str) -> float:
    """Half a unit of the last digit shown."""
    return 0.5000001 * 10.0 ** -len(text.partition(".")[2])


def by_seed(folder: Path, task: str, variant: str, metric: str) -> dict[int, float]:
    """Read from the files themselves."""
    found = {}
    for outcome in sorted((folder / "runs" / task / variant).glob("seed-*/outcome.json")):
        found[int(outcome.parent.name.removeprefix("seed-"))] = json.loads(outcome.read_text())["scores"][metric]
    return found


def t_interval(values: list[float]) -> tuple[float, float, float]:
    mean, n = plain_statistics.fmean(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * plain_statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "complete"
    write_study(folder, complete=True)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "partial"
    write_study(folder)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "empty"
    write_study(folder, complete=True)
    shutil.rmtree(folder / "runs")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """More tasks than are shown one by one, with a hole: one variant's runs of one setting failed."""
    points = [{"name": f"w{width}", "model": {"hidden_size": width}} for width in (32, 48, 64, 96, 128, 160, 192)]
    plan = PLAN | {"name": "grid", "grid": [{"name": "width", "points": points}]}
    folder = tmp_path_factory.mktemp("studies") / "grid"
    write_study(folder, complete=True, plan=plan)
    for seed in (folder / "runs" / "bytes-w32" / "mqa").iterdir():
        (seed / "outcome.json").unlink()
        (seed / "status.json").write_text(json.dumps({"status": "failed", "error": "The loss is NaN at step 3."}))
    report.write(folder)
    return folder


def page_of(folder: Path) -> Page:
    return Page((folder / "report" / "index.html").read_text())


def json_of(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


# Files


def test_the_page_comes_first_and_nothing_half_written_stays(complete):
    files = report.write(complete)
    names = [path.name for path in files]
    assert names[0] == "index.html"
    assert {"report.md", "report.json", "runs.csv", "curves.csv", "differences.csv", "frontier.svg"} <= set(names)
    assert sorted(path.name for path in (complete / "report").iterdir()) == sorted(names)


def test_the_same_folder_gives_the_same_bytes_in_every_process(complete):
    before = {path.name: path.read_bytes() for path in (complete / "report").iterdir()}
    code = f"from pathlib import Path; from twofold import report; report.write(Path({str(complete)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert {path.name: path.read_bytes() for path in (complete / "report").iterdir()} == before


def test_a_report_is_written_without_torch(complete):
    code = f"""
import sys
from pathlib import Path
from twofold import report
report.write(Path({str(complete)!r}))
sys.exit(', '.join({{'torch', 'transformers', 'accelerate'}} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path):
    write_study(tmp_path / "study", complete=True)
    (tmp_path / "study" / "report").write_text("in the way")
    with pytest.raises(TwofoldError, match="cannot be written"):
        report.write(tmp_path / "study")


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(TwofoldError, match="no study"):
        report.write(tmp_path)


# Numbers


@pytest.mark.parametrize("task", ["bytes", "recall"])
@pytest.mark.parametrize("state", ["complete", "partial"])
def test_the_main_table_agrees_with_the_files(task, state, request):
    folder = request.getfixturevalue(state)
    title = {"bytes": "Bytes of source text", "recall": "Associative recall"}[task]
    loss = {"bytes": "bits_per_byte", "recall": "loss"}[task]
    head, *rows = page_of(folder).table(f"Every variant on {title}")
    assert len(rows) == len(PLAN["variants"])
    column = {name: head.index(name) for name in head}
    loss_name = {"bytes": "bits per byte", "recall": "loss (nats)"}[task]
    reference = by_seed(folder, task, "mha", loss)
    for variant, row in zip(PLAN["variants"], rows, strict=True):
        own = by_seed(folder, task, variant["name"], loss)
        shown = row[column[loss_name]].split()
        for wanted, text in zip(t_interval(list(own.values())), numbers(" ".join(shown)), strict=True):
            assert abs(wanted - text) <= last_digit(shown[0])
        assert int(row[column["n"]]) == len(own)
        difference = row[column[f"Δ {loss_name}"]]
        if variant["name"] == "mha":
            assert difference == "–"
            continue
        pairs = [own[seed] - reference[seed] for seed in own if seed in reference]
        for wanted, text in zip(t_interval(pairs), numbers(difference), strict=True):
            assert abs(wanted - text) <= last_digit(difference.split()[0])


def test_costs_and_counts_in_the_table_are_the_runs(complete):
    head, *rows = page_of(complete).table("Every variant on Bytes of source text")
    with (complete / "report" / "runs.csv").open() as file:
        runs = {row["variant"]: row for row in csv.DictReader(file) if row["task"] == "bytes"}
    for variant, row in zip(PLAN["variants"], rows, strict=True):
        run = runs[variant["name"]]
        shown = dict(zip(head, row, strict=True))
        assert number(shown["Parameters"]) == int(run["parameters"])
        assert number(shown["Cached floats / token"]) == int(run["cached_floats_per_token"])
        assert number(shown["Cached bytes / token (bf16)"]) == int(run["cached_bytes_per_token"])
        assert shown["Runs done"] == "3 of 3"


def test_the_front_is_that_of_the_means(complete):
    sections = {section["name"]: section for section in json_of(complete)["sections"]}
    for task, loss in (("bytes", "bits_per_byte"), ("recall", "loss")):
        points = {}
        for variant in sections[task]["variants"]:
            values = by_seed(complete, task, variant["name"], loss)
            points[variant["name"]] = (variant["cost"], plain_statistics.fmean(values.values()))
        assert sections[task]["front"] == pareto_front(points)
        assert all(0 <= variant["front_frequency"] <= 1 for variant in sections[task]["variants"])


def test_the_controls_are_compared_with_what_they_match(complete):
    (comparison,) = json_of(complete)["sections"][0]["comparisons"]
    assert (comparison["within"], comparison["variant"], comparison["other"]) == ("cache", "gqa-2", "kv-tied")
    own, other = (by_seed(complete, "bytes", name, "bits_per_byte") for name in ("gqa-2", "kv-tied"))
    mean, low, high = t_interval([own[seed] - other[seed] for seed in own])
    assert comparison["difference"]["mean"] == pytest.approx(mean)
    assert comparison["difference"]["low"] == pytest.approx(low)
    assert comparison["difference"]["high"] == pytest.approx(high)


def test_values_by_seed_are_those_of_the_results(partial):
    results = Results.load(partial)
    summary = Summary(results)
    for task, facts in results.tasks.items():
        for variant in summary.variant_names(task):
            for metric in {facts.loss_metric, facts.score}:
                assert summary.by_seed(task, variant, metric) == results.by_seed(task, variant, metric)


def test_bands_of_curves_are_t_intervals_over_the_seeds_that_are_done(partial):
    results = Results.load(partial)
    summary = Summary(results)
    section = summary.sections[0]
    shown = curves(summary, section)
    rows = results.curves
    for curve in shown.held_out:
        done = set(by_seed(partial, "bytes", curve.variant, "bits_per_byte"))
        chosen = rows[(rows.task == "bytes") & (rows.variant == curve.variant) & (rows.split == "held_out")]
        chosen = chosen[(chosen.metric == "bits_per_byte") & chosen.seed.isin(done)]
        for index, tokens in enumerate(curve.tokens):
            wanted = interval(list(chosen[chosen.tokens == tokens].value))
            assert wanted.n == curve.n == len(done)
            assert curve.mean[index] == pytest.approx(wanted.mean)
            assert curve.low[index] == pytest.approx(wanted.low)
            assert curve.high[index] == pytest.approx(wanted.high)
    assert {curve.variant for curve in shown.difference} == {"kv-tied", "qk-tied", "one", "gqa-2", "mqa"}


def test_differences_csv_holds_every_difference(complete):
    with (complete / "report" / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (5 + 1)
    for row in rows:
        assert float(row["low"]) < float(row["mean"]) < float(row["high"])
        assert row["n"] == "3"


# Moments of a study


def test_before_the_first_run_ends_the_page_says_so(empty):
    text = (empty / "report" / "index.html").read_text()
    assert "0 of 36 runs done, 36 still to come." in text
    assert text.count("No run of this task has ended yet.") == 2
    assert "<svg" not in text
    assert "data-reload=" in text
    assert not (empty / "report" / "frontier.svg").exists()
    assert json_of(empty)["sections"][0]["front"] == []


def test_a_study_under_way_reloads_itself_and_a_complete_one_does_not(partial, complete):
    text = (partial / "report" / "index.html").read_text()
    assert '<html lang="en" data-study="synthetic" data-reload="10">' in text
    assert "24 of 36 runs done, 1 under way, 1 failed, 10 still to come." in text
    assert '<html lang="en" data-study="synthetic">' in (complete / "report" / "index.html").read_text()


def test_failed_runs_are_listed_with_their_sentence(partial):
    _, row = page_of(partial).table("1 failed run; they are in no mean")
    assert row == ["bytes", "(Q, K, V)", "2", "The loss is NaN at step 100."]
    assert "The loss is NaN at step 100." in (partial / "report" / "report.md").read_text()


def test_one_seed_gives_means_and_no_verdict(tmp_path):
    write_study(tmp_path / "one", complete=True, plan=PLAN | {"seeds": [7]})
    report.write(tmp_path / "one")
    answers = [sentence for section in json_of(tmp_path / "one")["sections"] for sentence in section["answer"]]
    assert any("no interval, so no verdict" in sentence for sentence in answers)
    assert not any(re.search(r"\b(better|worse)\b", sentence) for sentence in answers)
    assert "too few seeds" in answers[-1]


def test_all_runs_failed(tmp_path):
    folder = tmp_path / "failed"
    write_study(folder, complete=True)
    for status in folder.rglob("status.json"):
        status.write_text(json.dumps({"status": "failed", "error": "No room is left on the disk."}))
    report.write(folder)
    text = (folder / "report" / "index.html").read_text()
    assert "0 of 36 runs done, 36 failed." in text
    assert "data-reload=" not in text


def test_mixed_results_are_announced(tmp_path):
    folder = tmp_path / "mixed"
    write_study(folder, complete=True)
    study = json.loads((folder / "study.json").read_text())
    study["provenance"]["code_changes"] = [{"at": "2026-09-02", "what": "torch 2.13.0 is now 2.14.0"}]
    (folder / "study.json").write_text(json.dumps(study))
    report.write(folder)
    text = (folder / "report" / "index.html").read_text()
    assert "<strong>Mixed:</strong>" in text
    assert "torch 2.13.0 is now 2.14.0" in text


# A grid of many tasks


def test_a_grid_is_shown_as_a_whole(grid):
    sections = json_of(grid)["sections"]
    assert len(Results.load(grid).tasks) == 14 > MAX_SINGLE_TASKS
    assert [(section["name"], len(section["tasks"])) for section in sections] == [("bytes", 7), ("recall", 7)]
    assert sections[0]["complete_tasks"] == 6
    page = page_of(grid)
    assert [row[0] for row in page.table("accuracy by width, mean over the other axes")[1:]][:2] == ["w32", "w48"]
    assert "--only recall" in (grid / "report" / "index.html").read_text()


def test_a_grid_averages_only_what_all_variants_have_finished(grid):
    """The setting that one variant failed counts for none, or the means would not be of the same tasks."""
    section = json_of(grid)["sections"][0]
    tasks = [f"bytes-w{width}" for width in (48, 64, 96, 128, 160, 192)]
    for variant in section["variants"]:
        values = [by_seed(grid, task, variant["name"], "bits_per_byte") for task in tasks]
        means = [plain_statistics.fmean(own[seed] for own in values) for seed in (0, 1, 2)]
        mean, low, high = t_interval(means)
        assert variant["loss"]["mean"] == pytest.approx(mean)
        assert variant["loss"]["low"] == pytest.approx(low)
        assert variant["loss"]["high"] == pytest.approx(high)
    assert {v["name"]: v["cost"] for v in section["variants"]}["mqa"] == pytest.approx(0.25)


def test_the_page_of_a_large_grid_stays_small(grid):
    assert (grid / "report" / "index.html").stat().st_size < 2_000_000


# The page


@pytest.mark.parametrize("state", ["complete", "partial", "empty", "grid"])
def test_the_page_is_well_formed_and_can_be_heard(state, request):
    page = page_of(request.getfixturevalue(state))
    assert not page.unbalanced
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for target in (attributes.get("aria-labelledby") or "").split():
            assert target in ids
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(table["caption"] for table in page.tables)
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in page.elements if tag == "th")
    plots = [a for tag, a in page.elements if tag == "svg" and a.get("xmlns")]
    assert all(attributes.get("aria-label") for attributes in plots)
    assert {"main", "nav", "header"} <= {tag for tag, _ in page.elements}


@pytest.mark.parametrize("state", ["complete", "partial", "empty", "grid"])
def test_the_page_loads_nothing_from_anywhere(state, request):
    folder = request.getfixturevalue(state)
    page = page_of(folder)
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        link = attributes.get("href") or attributes.get("xlink:href") or ""
        assert not re.match(r"\w+:(?!,)", link), link
    text = (folder / "report" / "index.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {SVG_NAMESPACE}
    links = [a["href"] for tag, a in page.elements if tag == "a" and not (a["href"] or "").startswith("#")]
    assert links
    assert all((folder / "report" / link).is_file() for link in links)


def test_text_of_a_plan_or_an_error_is_never_markup(tmp_path):
    evil = "<script>alert('x')</script>&\"|*"
    variants = [variant | {"label": f"{evil} {variant['name']}"} for variant in PLAN["variants"]]
    plan = PLAN | {"variants": variants, "title": evil, "question": evil}
    plan["tasks"] = [PLAN["tasks"][0] | {"title": evil}, PLAN["tasks"][1]]
    folder = tmp_path / "evil"
    write_study(folder, plan=plan)
    for status in folder.rglob("status.json"):
        if "failed" in status.read_text():
            status.write_text(json.dumps({"status": "failed", "error": evil}))
    report.write(folder)
    text = (folder / "report" / "index.html").read_text()
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(&#39;x&#39;\)&lt;/script&gt;", "", text)
    assert not Page(text).unbalanced
    ET.parse(folder / "report" / "frontier.svg")
    markdown = (folder / "report" / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<script\\>", "")


def test_every_figure_says_how_to_make_it_again(complete):
    text = (complete / "report" / "index.html").read_text()
    for task in ("bytes", "recall"):
        assert text.count(f"Made by <code>twofold study run synthetic --only {task}</code>") == 3
    assert text.count("<figure") == 6


def test_a_study_begun_in_part_is_made_again_whole(tmp_path):
    folder = tmp_path / "part"
    write_study(folder, complete=True)
    study = json.loads((folder / "study.json").read_text())
    study["provenance"]["command"] = "twofold study run synthetic --only seed-0 --workers 2"
    (folder / "study.json").write_text(json.dumps(study))
    report.write(folder)
    assert json_of(folder)["commands"]["run"] == "twofold study run synthetic --workers 2"


def test_the_provenance_is_whole(complete):
    text = (complete / "report" / "index.html").read_text()
    for told in (
        "0" * 40,
        "c" * 64,
        "d" * 64,
        "torch 2.13.0",
        "x86_64, 2 cores, 24 GiB of memory",
        "2026-09-01T12:00:00",
    ):
        assert told in text


def test_the_picture_is_one_file_with_every_variant(complete):
    root = ET.parse(complete / "report" / "frontier.svg").getroot()
    texts = {"".join(element.itertext()) for element in root.iter(f"{{{SVG_NAMESPACE}}}text")}
    for label in ("(Q, K, V)", "(Q, K=V)", "(Q=K, V)", "(Q=K=V)", "GQA-2", "MQA"):
        assert any(text.startswith(label) for text in texts), label
    style = next(root.iter(f"{{{SVG_NAMESPACE}}}style")).text
    assert "light-dark" not in style
    assert not any("tabindex" in element.attrib for element in root.iter())


def test_markdown_holds_the_same_numbers(complete):
    _, *rows = page_of(complete).table("Every variant on Bytes of source text")
    markdown = (complete / "report" / "report.md").read_text()
    for row in rows:
        mean = row[4].split("\n")[0]
        assert mean in markdown


def test_no_variant_is_called_by_a_mangled_name(complete, grid):
    for folder in (complete, grid):
        for path in (folder / "report").iterdir():
            assert "Q-K=V" not in path.read_text()
            assert "Q=K-V" not in path.read_text()
