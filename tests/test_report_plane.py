"""The map of the plane beside a report: its numbers against the runs' own files, its words, its picture, and the page in a browser."""

from __future__ import annotations

import copy
import json
import math
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study_fixture import PLAN, write_study
from test_report import by_seed, t_interval
from test_report_page import Watched, browser  # noqa: F401 - a fixture
from twofold import report
from twofold.plane import covering, neighbours, on_disc, point_of
from twofold.report import plane
from twofold.report.plane.figure import Colours, cells
from twofold.report.plane.sheets import Sheet, sheets
from twofold.report.summary import Summary
from twofold.study.results import Results
from twofold.tie import Tie

ROOT = Path(__file__).resolve().parent.parent
TIES = [str(place.tie) for place in covering()[:16]]
# A tie's loss in the fixture: what is lost where V is a multiple of Q, and chance.
LOST, CHANCE = 1.0, 0.01


def plan(ties: list[str]) -> dict[str, Any]:
    values = copy.deepcopy(PLAN)
    values["variants"] = [PLAN["variants"][0], {"name": "tie", "ties": ties}, *PLAN["variants"][4:]]
    values["variants"][2]["matches"] = []
    return values


def write(folder: Path, ties: list[str], seeds: int = 3) -> Path:
    """A study in which V = cQ loses and all else is chance."""
    write_study(folder, complete=True, plan=plan(ties) | {"seeds": list(range(seeds))})
    for path in folder.glob("runs/*/*/*/outcome.json"):
        place = point_of(Tie.parse(json.loads((path.parent / "run.json").read_text())["model"]["tie"]))
        draw = np.random.default_rng([*str(path.relative_to(folder)).encode()])
        loss = 1.5 + CHANCE * draw.standard_normal()
        loss += LOST if place and place.numbers[1] == 0 else 0.0
        values = json.loads(path.read_text())
        values["scores"] = dict.fromkeys(values["scores"], loss)
        if "accuracy" in values["scores"]:
            values["scores"]["accuracy"] = 1 / (1 + loss)
        path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("studies") / "plane", TIES)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def found(study: Path) -> list[Sheet]:
    return sheets(Summary(Results.load(study)))


def test_a_map_has_a_sheet_for_each_task_and_reading(found: list[Sheet]):
    assert [(sheet.section.name, sheet.metric) for sheet in found] == [
        ("bytes", "bits_per_byte"), ("recall", "loss"), ("recall", "accuracy"),
    ]  # fmt: skip
    assert [sheet.higher_is_better for sheet in found] == [False, False, True]
    assert all([place.text for place in sheet.places] == TIES for sheet in found)


def test_values_and_steps_are_those_of_the_runs(study: Path, found: list[Sheet]):
    for sheet in found:
        values = {
            place.text: by_seed(study, sheet.section.name, place.variant.name, sheet.metric) for place in sheet.places
        }
        reference = by_seed(study, sheet.section.name, "mha", sheet.metric)
        for place in sheet.places:
            own = values[place.text]
            assert (place.value.mean, place.value.low, place.value.high) == pytest.approx(t_interval([*own.values()]))
            paired = t_interval([own[seed] - reference[seed] for seed in own])
            assert (place.difference.mean, place.difference.low, place.difference.high) == pytest.approx(paired)
        pairs = neighbours([place.point for place in sheet.places])
        assert {frozenset((step.better.text, step.worse.text)) for step in sheet.steps} == {
            frozenset((TIES[i], TIES[j])) for i, j in pairs
        }
        for step in sheet.steps:
            assert (step.worse.value.mean >= step.better.value.mean) is not sheet.higher_is_better
            paired = [values[step.worse.text][seed] - values[step.better.text][seed] for seed in range(3)]
            assert step.difference.mean == pytest.approx(sum(paired) / 3)


def test_mirror_images_are_pairs_that_differ_by_the_sign_of_v(found: list[Sheet]):
    pairs = {frozenset((step.better.text, step.worse.text)) for step in found[0].mirrors}
    assert frozenset(("V = -K", "(Q, K=V)")) in pairs
    assert frozenset(("V = Q - K", "V = -Q + K")) in pairs
    wanted = {
        frozenset((str(place.tie), str(place.mirror.tie)))
        for place in covering()[:16]
        if place.mirror in covering()[:16]
    }
    assert pairs == wanted
    sizes = [step.size for step in found[0].mirrors]
    assert found[0].chance == max(sizes) < 0.1


def test_cliffs_stand_where_something_is_lost_and_nowhere_else(found: list[Sheet]):
    for sheet in found:
        across = [
            step for step in sheet.steps if (step.better.point.numbers[1] == 0) != (step.worse.point.numbers[1] == 0)
        ]
        large = 0.5 * LOST / (1 if sheet.metric != "accuracy" else 8)
        assert len(across) > 4
        assert {id(step) for step in across} <= {id(step) for step in sheet.cliffs}
        assert all(step.size > large for step in across)
        assert all(step.worse.point.numbers[1] == 0 for step in across)
        assert len(sheet.cliffs) - len(across) <= 2, "chance alone may make a step or two"
        assert [step.size for step in sheet.cliffs] == sorted((step.size for step in sheet.cliffs), reverse=True)
        assert sheet.regions[-1].region == "V is a multiple of Q"
        assert sum(summary.ties for summary in sheet.regions) == len(TIES)
        assert sum(summary.steps for summary in sheet.borders) == len(sheet.steps)
        assert sum(summary.cliffs for summary in sheet.borders) == len(sheet.cliffs)


def test_the_words_say_the_numbers(study: Path, found: list[Sheet]):
    told = json.loads((study / "report" / "plane.json").read_text())
    first, second = told["question"]["sentences"]
    assert first.startswith("Bytes of source text: V = Q - K is ")
    assert " (Q, K, V)" in first
    assert " (Q, K=V)" in first
    assert second.startswith("Associative recall: ")
    for sheet, values in zip(found, told["sheets"], strict=True):
        crossing = sum(step.crosses_border for step in sheet.cliffs)
        assert f"{crossing} of {sum(step.crosses_border for step in sheet.steps)} steps across a border" in " ".join(
            values["sentences"]
        )
        assert len(values["cliffs"]) == len(sheet.cliffs)
        assert len(values["ties"]) == len(TIES)
        best = values["cliffs"][0]
        assert best["text"].startswith(f"{best['better']} → {best['worse']}: worse by ")
        pairs = values["mirrors"]
        assert f"Of {pairs['pairs']} pairs of mirror images" in values["sentences"][-1]
        assert f", {pairs['straddling']} have an interval that holds zero" in values["sentences"][-1]


def test_one_seed_is_no_cliff(tmp_path: Path):
    folder = write(tmp_path / "study", TIES, seeds=1)
    for sheet in sheets(Summary(Results.load(folder))):
        assert sheet.chance == math.inf
        assert not sheet.cliffs
    told = json.loads(plane.texts(Summary(Results.load(folder)), "x")["plane.json"])
    assert told["sheets"][0]["chance"] is None
    assert "Too few seeds" in " ".join(told["sheets"][0]["sentences"])


def test_studies_without_a_plane_have_no_map(tmp_path: Path):
    """Seven ties are none; neither is a tie in another model, a control, or one of two equations."""
    values = plan(TIES[:7])
    values["variants"] += [
        {"name": "other", "model": {"tie": TIES[7], "head_dim": 16}},
        {"name": "watch", "kind": "control", "note": "a control", "model": {"tie": TIES[8]}},
        {"name": "one", "model": {"tie": "(Q=K=V)"}},
        {"name": "again", "model": {"tie": TIES[0]}},
        {"name": "mixed", "model": {"tie": f"(Q, K, V) | {TIES[9]}"}},
    ]
    write_study(tmp_path / "study", complete=True, plan=values)
    assert plane.texts(Summary(Results.load(tmp_path / "study")), "x") == {}
    values["variants"].append({"name": "eighth", "model": {"tie": TIES[10]}})
    write_study(tmp_path / "more", complete=True, plan=values)
    assert {"plane.html", "plane.svg", "plane.json"} <= {path.name for path in report.write(tmp_path / "more")}


def test_a_study_that_has_not_begun_has_no_map_and_half_of_one_has_what_is_measured(tmp_path: Path):
    write_study(tmp_path / "half", plan=plan(TIES))
    half = sheets(Summary(Results.load(tmp_path / "half")))
    assert half
    for path in (tmp_path / "half").glob("runs/*/*/*/status.json"):
        path.unlink()
    assert plane.texts(Summary(Results.load(tmp_path / "half")), "x") == {}


# The picture


def test_the_same_folder_gives_the_same_bytes_and_whole_files(study: Path):
    texts = plane.texts(Summary(Results.load(study)), "twofold study report studies/plane")
    again = plane.texts(Summary(Results.load(study)), "twofold study report studies/plane")
    assert texts == again
    root = ET.fromstring(texts["plane.svg"])
    assert root.tag.endswith("svg")
    assert "light-dark" not in texts["plane.svg"]
    assert not [
        value for value in ("http://", "https://") if value in texts["plane.svg"].replace("http://www.w3.org", "")
    ]
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    used = {element.get("href", "#")[1:] for element in root.iter() if element.tag.endswith("use")}
    assert used <= ids
    # Two tasks, a mark for each tie and two for those of the rim.
    marks = [element for element in root.iter() if "marker" in (element.get("class") or "")]
    assert len(marks) == 2 * (len(TIES) + sum(place.is_on_rim for place in covering()[:16]))


def outlines() -> list[list[np.ndarray]]:
    """Of all 70 ties, the corners [n, 2] of what is drawn for each, in units of the disc."""
    drawn = ET.fromstring(str(cells(covering(), "k")))
    paths = [path.get("d", "") for path in drawn.iter() if (path.get("id") or "").startswith("cell-k-")]
    return [
        [
            np.array([[float(n) for n in pair.split(",")] for pair in part[1:].split()]) / 1000
            for part in d.split("Z")
            if part
        ]
        for d in paths
    ]


def holds(outline: np.ndarray, x: float, y: float) -> bool:
    """Whether a ray from the place leaves the outline an odd number of times."""
    (ax, ay), (bx, by) = outline.T, np.roll(outline, -1, axis=0).T
    crossed = (ay > y) != (by > y)
    slope = np.divide(bx - ax, by - ay, out=np.zeros_like(ax), where=by != ay)
    return bool(np.count_nonzero(crossed & (x < ax + slope * (y - ay))) % 2)


def test_every_place_of_the_disc_lies_in_the_cell_of_its_nearest_tie_and_in_no_other():
    drawn, directions = outlines(), np.array([place.direction for place in covering()])
    chosen = np.random.default_rng(0).normal(size=(400, 3))
    chosen[:, 2] = abs(chosen[:, 2])
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    checked = 0
    for direction in chosen:
        degrees = np.degrees(np.arccos(np.minimum(np.abs(directions @ direction), 1)))
        first, second = np.argsort(degrees)[:2]
        if degrees[second] - degrees[first] < 1:
            continue  # straight edges between the corners are not exactly the border
        x, y = on_disc(direction)
        inside = [index for index, parts in enumerate(drawn) if any(holds(part, x, -y) for part in parts)]
        assert inside == [first]
        checked += 1
    assert checked > 300


def test_colours_go_from_the_best_to_the_worst(found: list[Sheet]):
    for sheet in found:
        colours = Colours.of(sheet)
        ordered = sorted(sheet.places, key=lambda place: place.value.mean, reverse=sheet.higher_is_better)
        levels = [colours.level(place.value.mean) for place in ordered]
        assert levels == sorted(levels)
        assert levels[0] <= 1
        assert levels[-1] == 8


# The page


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_shows_one_sheet_and_says_what_is_pointed_at(browser, study: Path, width: int):  # noqa: F811
    with Watched(browser, study / "report" / "plane.html", width=width) as page:
        shown = page.locator(".sheet:visible")
        assert shown.get_attribute("id") == "bytes-loss"
        assert page.get_by_role("button", name="Score").is_disabled()
        page.get_by_role("button", name="Associative recall").click()
        assert shown.get_attribute("id") == "recall-loss"
        page.get_by_role("button", name="Score").click()
        assert shown.get_attribute("id") == "recall-score"
        for summary in shown.locator("summary").all():
            summary.click()
        points = shown.locator("svg.plane:visible .point")
        assert points.count() == len(TIES)
        assert [point.get_attribute("tabindex") for point in points.all()].count("0") == 1
        tip = page.locator("#tip")
        points.nth(3).hover()
        assert tip.inner_text().startswith(TIES[3])
        assert "Bytes of source text, bits per byte" in tip.inner_text()
        page.mouse.move(0, 0)
        for other in (1280, 640, 360, 320):
            page.set_viewport_size({"width": other, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= other


def test_arrows_go_to_the_nearest_mark_on_that_side(browser, study: Path):  # noqa: F811
    with Watched(browser, study / "report" / "plane.html") as page:
        svg = page.locator(".sheet:visible svg.plane:visible").first
        at = "document.activeElement.dataset.tie"
        svg.locator(f".point[data-tie='{TIES[0]}']").focus()
        seen = [page.evaluate(at)]
        for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
            before = page.evaluate(
                "(r => [r.left, r.top])(document.activeElement.querySelector('.marker').getBoundingClientRect())"
            )
            page.keyboard.press(key)
            after = page.evaluate(
                "(r => [r.left, r.top])(document.activeElement.querySelector('.marker').getBoundingClientRect())"
            )
            seen.append(page.evaluate(at))
            if seen[-1] != seen[-2]:
                axis, sign = (
                    (0 if key in ("ArrowLeft", "ArrowRight") else 1),
                    (1 if key in ("ArrowRight", "ArrowDown") else -1),
                )
                assert (after[axis] - before[axis]) * sign > 0
        assert len(set(seen)) > 2
        assert page.locator("#tip").inner_text().startswith(seen[-1])
        page.keyboard.press("Escape")
        assert not page.locator("#tip").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_prints_all_sheets_and_has_both_themes(browser, study: Path, scheme: str):  # noqa: F811
    with Watched(browser, study / "report" / "plane.html", scheme=scheme) as page:
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        assert page.evaluate(ground) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        page.emulate_media(media="print")
        assert page.locator(".sheet:visible").count() == 3
        assert page.locator("nav:visible, #theme:visible, .controls:visible").count() == 0


def test_without_scripts_everything_is_there(browser, study: Path):  # noqa: F811
    with Watched(browser, study / "report" / "plane.html", scripts=False) as page:
        assert page.locator(".sheet:visible").count() == 3
        assert page.locator(".sheet:visible ol.cliffs").count() >= 3


def test_the_report_leads_to_the_map(browser, study: Path):  # noqa: F811
    page = (study / "report" / "index.html").read_text()
    assert 'href="plane.html">The plane of ties' in page
    assert 'data-file="plane.json"' in page


# On the pages of the documentation


def test_the_map_is_quoted_and_what_is_not_measured_is_said(study: Path, tmp_path: Path):
    quote = runpy.run_path(str(ROOT / "docs" / "quote.py"))
    (tmp_path / "docs" / "results").mkdir(parents=True)
    page = tmp_path / "docs" / "plane.md"
    page.write_text("<!-- question: synthetic -->\nold\n<!-- end -->\n<!-- plane: synthetic -->\nold\n<!-- end -->\n")
    assert "Not measured yet" in quote["quoted"](page, tmp_path)
    quote["take"](study, tmp_path)
    text = quote["quoted"](page, tmp_path)
    told = json.loads((study / "report" / "plane.json").read_text())
    assert "\nold\n" not in text
    assert "(results/synthetic/plane.svg)](results/synthetic/plane.html)" in text
    for line, sentence in zip(text.splitlines()[1:3], told["question"]["sentences"], strict=True):
        assert line.replace("\\", "") == f"- {sentence}"
    first = told["sheets"][0]["cliffs"][:5]
    assert [cliff["text"] for cliff in first] == [
        line.replace("\\", "")[2:] for line in text.splitlines() if " → " in line
    ][: len(first)]


def test_the_kept_map_has_every_tie_of_the_covering():
    kept = ROOT / "docs" / "results" / "plane" / "plane.json"
    if not kept.exists():
        pytest.skip("no result of the plane study is kept in docs/results yet")
    told = json.loads(kept.read_text())
    for sheet in told["sheets"]:
        assert [tie["tie"] for tie in sheet["ties"]] == [str(place.tie) for place in covering()]
