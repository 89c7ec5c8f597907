"""The map as one HTML page with everything in it, which works without a network and without scripts; and as a picture for other pages."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from twofold.plane import Point
from twofold.report.answer import status
from twofold.report.assets import environment, text_of
from twofold.report.drawing import svg, tag
from twofold.report.files import card
from twofold.report.numbers import common_decimals, decimals, metric_name, number, with_interval
from twofold.report.page import figure_style, run_command
from twofold.report.plane import words
from twofold.report.plane.figure import Colours, Frame, cells, disc, scale
from twofold.report.plane.figure import figure as drawn
from twofold.report.plane.sheets import Sheet
from twofold.report.summary import Summary

WIDE, NARROW = 720, 344


def html(summary: Summary, sheets: list[Sheet], report_command: str) -> str:
    """The whole page."""
    return (
        environment()
        .get_template("plane.html.j2")
        .render(
            plan=summary.plan,
            css=figure_style() + text_of("style.css") + text_of("plane/plane.css") + text_of("plane/page.css"),
            theme_js=text_of("theme.js"),
            furniture_js=text_of("furniture.js"),
            plane_js=text_of("plane/plane.js"),
            status=status(summary),
            question=words.question(sheets),
            tie=words.QUESTION,
            tasks=_tasks(sheets),
            sheets=[_view(sheet) for sheet in sheets],
            geometries=[cells(points, key) for key, points in _geometries(sheets).items()],
            tips=json.dumps(_tips(sheets), ensure_ascii=False).replace("<", "\\u003c"),
            run_command=run_command(summary),
            report_command=report_command,
        )
    )


def _tasks(sheets: list[Sheet]) -> list[tuple[str, str]]:
    """Name and title of each task, once."""
    return list(dict.fromkeys((sheet.section.name, sheet.section.title) for sheet in sheets))


def _geometries(sheets: list[Sheet]) -> dict[str, list[Point]]:
    """What cells there are, by key: sheets with the same ties share theirs."""
    return {_geometry(sheet): [place.point for place in sheet.places] for sheet in sheets}


def _geometry(sheet: Sheet) -> str:
    return sha256("|".join(place.text for place in sheet.places).encode()).hexdigest()[:8]


def _tips(sheets: list[Sheet]) -> dict[str, str]:
    """What a tie says when it is pointed at."""
    places = {place.text: place for sheet in sheets for place in sheet.places}
    return {text: "\n".join(words.tip(place, sheets)) for text, place in places.items()}


def _view(sheet: Sheet) -> dict[str, Any]:
    shown = [words.cliff(step, sheet) for step in sheet.cliffs]
    key = f"{sheet.section.name}-{'loss' if sheet.is_loss else 'score'}"
    return {
        "key": key,
        "task": sheet.section.name,
        "reading": "loss" if sheet.is_loss else "score",
        "title": sheet.section.title,
        "metric": metric_name(sheet.metric),
        "wide": drawn(sheet, WIDE, key=_geometry(sheet)),
        "narrow": drawn(sheet, NARROW, key=_geometry(sheet)),
        "sentences": [text for text in (words.regions(sheet), words.cliffs(sheet), words.mirrors(sheet)) if text],
        "cliffs": shown[: words.MAX_CLIFFS],
        "more_cliffs": shown[words.MAX_CLIFFS :],
        "regions": _region_rows(sheet),
        "borders": _border_rows(sheet),
        "ties": _tie_rows(sheet),
        "reference": sheet.section.reference.label,
    }


def _region_rows(sheet: Sheet) -> list[dict[str, Any]]:
    places = decimals(sheet.reference.low, sheet.reference.high, sheet.reference.mean)
    return [
        {
            "region": str(summary.region),
            "ties": summary.ties,
            "mean": number(summary.mean, places),
            "best": number(summary.best, places),
            "worst": number(summary.worst, places),
        }
        for summary in sheet.regions
    ]


def _border_rows(sheet: Sheet) -> list[dict[str, Any]]:
    places = decimals(sheet.reference.low, sheet.reference.high, sheet.reference.mean)
    return [
        {
            "border": words.border(summary),
            "steps": summary.steps,
            "cliffs": summary.cliffs,
            "mean": number(summary.mean, places),
        }
        for summary in sheet.borders
    ]


def _tie_rows(sheet: Sheet) -> list[dict[str, Any]]:
    """Every tie, the best first."""
    ordered = sorted(sheet.places, key=lambda place: place.value.mean, reverse=sheet.higher_is_better)
    own = common_decimals(place.value for place in ordered)
    differences = common_decimals(place.difference for place in ordered)
    return [
        {
            "tie": place.text,
            "region": str(place.point.region),
            "value": with_interval(place.value, own),
            "difference": with_interval(place.difference, differences, sign=True),
            "n": place.value.n,
        }
        for place in ordered
    ]


# The picture


def picture(sheets: list[Sheet]) -> str:
    """A disc for each task, side by side, in its loss: a light card, which reads on any ground."""
    shown = [sheet for sheet in sheets if sheet.is_loss]
    size, gap = 290.0, 30.0
    width, height = len(shown) * (size + gap) - gap, size + 150.0
    parts = [cells(points, key) for key, points in _geometries(shown).items()]
    for index, sheet in enumerate(shown):
        left = index * (size + gap)
        frame = Frame(x=left + size / 2, y=58 + size / 2, radius=size / 2 - 6)
        colours = Colours.of(sheet)
        parts += [
            tag("text", sheet.section.title, x=left, y=16.0, class_="row-heading"),
            tag("text", f"{metric_name(sheet.metric)}: pale is better", x=left, y=34.0, class_="tick"),
            disc(sheet, frame, colours, key=_geometry(sheet), is_mute=True),
            scale(sheet, colours, left=left + 6, right=left + size - 6, y=size + 88),
        ]
    ties = max(len(sheet.places) for sheet in shown)
    legend = (
        f"{ties} ties, each where V = pQ + qK has its p to the right and its q upwards. Squares: V = cK; triangles: V = cQ; "
        "diamonds, on the rim: Q = cK. Red: cliffs."
    )
    parts.append(tag("text", legend, x=0.0, y=height - 6, class_="tick"))
    label = "; ".join(f"{sheet.section.title}: {len(sheet.cliffs)} cliffs" for sheet in shown)
    figure = svg(parts, width, height, label=f"The plane of ties. {label}.", class_="plane")
    return card(figure, css=text_of("plane/plane.css"))
