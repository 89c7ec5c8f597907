"""Results on these pages: numbers are quoted from the reports' own files, never typed.

    python docs/quote.py                   # rewrite what stands between <!-- result: NAME --> and <!-- end -->
    python docs/quote.py studies/laptop    # first take the report of a study folder into docs/results/laptop

A block ``<!-- result: NAME -->`` holds the picture and the answer of ``docs/results/NAME``; the block ``<!-- results -->`` lists all results that there
are; a block ``<!-- benchmark: NAME -->`` holds the rows of ``docs/results/NAME.json``, as ``benchmarks/NAME.py --json`` printed them, and
``<!-- goals: NAME -->`` those of them that have a goal, as a table of cases and measures where names are "case: measure". ``<!-- choice: NAME -->`` says what to choose within parts of the cache, and
``<!-- pairs: NAME -->`` the differences of all pairs that are equal in something, both for the first task of ``docs/results/NAME``. ``<!-- question: NAME -->``
and ``<!-- plane: NAME -->`` are what the map ``docs/results/NAME/plane.json`` says of the tie that was asked about, and the map itself. ``<!-- parts: NAME -->`` holds the pictures and sentences
of what the report says of several tasks together, ``<!-- answers: NAME -->`` what it says first of each task by itself, with its controls, ``<!-- scores: NAME -->`` every score with its chance level, and
``<!-- harness: NAME -->`` what ``twofold harness --json`` printed into ``docs/results/NAME-harness.json``. ``<!-- geometry: NAME -->`` and
``<!-- published: NAME -->`` are the measures that ``twofold geometry --json`` printed into ``docs/results/geometry/NAME.json``, and published figures beside them. A test
fails where a page says anything else than the files.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("docs", "results")
NOT_RUN = "*Not run yet: no result of this study is kept.*"
HIGHEST_CLIFFS = 5
QUANTITIES = {"flops": "operations of training"}
BLOCK = re.compile(
    r"(<!-- (?P<kind>results?|benchmark|goals|choice|pairs|question|plane|parts|answers|scores|harness|geometry|published)(?:: (?P<name>\S+))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may quote."""
    own = [root / "README.md", *(root / "docs").glob("*.md"), root / RESULTS / "index.md"]
    return sorted(page for page in own if page.exists())


def quoted(page: Path, root: Path = ROOT) -> str:
    """The page's text with every block as the reports have it."""

    def block(found: re.Match[str]) -> str:
        if found["kind"] in ("benchmark", "goals"):
            lines = (_rows if found["kind"] == "benchmark" else _goals)(root, found["name"])
        elif found["kind"] in ("question", "plane"):
            lines = _asked(root, found["name"]) if found["kind"] == "question" else _plane(page, root, found["name"])
        elif found["kind"] in ("parts", "answers"):
            lines = (_parts if found["kind"] == "parts" else _answers)(page, root, found["name"])
        elif found["kind"] in ("scores", "harness"):
            lines = _scores(page, root, found["name"]) if found["kind"] == "scores" else _harness(root, found["name"])
        elif found["kind"] in ("geometry", "published"):
            lines = (_geometry if found["kind"] == "geometry" else _published)(root, found["name"])
        elif found["kind"] in ("choice", "pairs"):
            lines = (_choice if found["kind"] == "choice" else _pairs)(root, found["name"])
        else:
            lines = _quote(page, root, found["name"]) if found["name"] else _list(page, root)
        return found[1] + "".join(f"{line}\n" for line in lines) + "<!-- end -->"

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def _report(root: Path, name: str) -> dict[str, Any] | None:
    path = root / RESULTS / name / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _quote(page: Path, root: Path, name: str) -> Iterator[str]:
    """The central figure, the first and the last thing that the report says of the study's first task, and where it came from."""
    report = _report(root, name)
    if report is None:
        return
    section, folder = report["sections"][0], _link(page, root, name)
    yield f"[![{section['title']}: loss against cached bytes per token, every variant and the Pareto front]({folder}/frontier.svg)]({folder}/report.md)"
    yield ""
    answer = section["answer"]
    yield f"**{section['title']}.** " + " ".join(
        _plain(sentence) for sentence in dict.fromkeys([answer[0], answer[-1]])
    )
    yield f"[The whole report]({folder}/report.md) has the controls at equal cache and equal parameters, the curves and the other tasks;"
    yield f"`{report['commands']['run']}` makes it again."


def _parts(page: Path, root: Path, name: str) -> Iterator[str]:
    """The figure and the sentences of each part of a report that is about several tasks."""
    report = _report(root, name)
    if report is None:
        yield NOT_RUN
        return
    folder = _link(page, root, name)
    for part in report["parts"]:
        yield f"[![{part['title']}]({folder}/{part['name']}.svg)]({folder}/report.md)"
        yield ""
        yield from (f"- {_plain(sentence)}" for sentence in part["sentences"])
        yield ""
    yield f"`{report['commands']['run']}` makes it again."


def _answers(page: Path, root: Path, name: str) -> Iterator[str]:
    """The first sentence on each task, and whether the controls of the evidence came out as they must."""
    report = _report(root, name)
    if report is None:
        yield NOT_RUN
        return
    for section in report["sections"]:
        if section["answer"]:
            yield f"- **{_plain(section['title'])}.** {_plain(section['answer'][0])}"
        yield from (f"- **{_plain(section['title'])}, a control.** {_plain(c['text'])}" for c in section["controls"])
    yield ""
    yield f"[The whole report]({_link(page, root, name)}/report.md); `{report['commands']['run']}` makes it again."


def _list(page: Path, root: Path) -> Iterator[str]:
    names = sorted(path.parent.name for path in (root / RESULTS).glob("*/report.json"))
    if not names:
        yield "No study's result has been kept yet."
        return
    yield "| study | question | runs | minutes of one core | machine | made by |"
    yield "|---|---|---|--:|---|---|"
    minutes = {name: _minutes(root, name) for name in names}
    for name in names:
        report = _report(root, name) or {}
        hardware = report["provenance"].get("hardware", {})
        cells = [
            f"[{_plain(report['title'])}]({_link(page, root, name)}/report.md) ([page]({_link(page, root, name)}/index.html))",
            _plain(report["question"]),
            _plain(report["status"]["text"]),
            f"{minutes[name]:.0f}",
            _plain(f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores"),
            f"`{report['commands']['run']}`",
        ]
        yield f"| {' | '.join(cells)} |"
    whole = sum(minutes.values())
    yield ""
    yield f"A run takes one core. All of them together took {whole:.0f} minutes of one core, which is {whole / 120:.1f} hours of two."


def _minutes(root: Path, name: str) -> float:
    """What the runs of a result took, summed."""
    with (root / RESULTS / name / "runs.csv").open(encoding="utf-8", newline="") as file:
        return sum(float(run["seconds"]) for run in csv.DictReader(file) if run["status"] == "done") / 60


def _benchmark(root: Path, name: str) -> list[dict[str, Any]]:
    path = root / RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _rows(root: Path, name: str) -> Iterator[str]:
    """The table of a benchmark; a goal that was not met is said as plainly as one that was."""
    yield from _row_table(_benchmark(root, name))


def _goals(root: Path, name: str) -> Iterator[str]:
    """What has a goal: a row for each case and a column for each measure where names are "case: measure", else a row for each."""
    rows = [row for row in _benchmark(root, name) if row["met"] is not None]
    cells = {tuple(row["name"].split(": ", 1)): row for row in rows}
    if not all(len(cell) == 2 for cell in cells) or not rows:
        yield from _row_table(rows)
        return
    measures = {measure: row["goal"] for (_, measure), row in cells.items()}
    yield f"| | {' | '.join(f'{_plain(measure)} ({goal})' for measure, goal in measures.items())} |"
    yield f"|---|{'--:|' * len(measures)}"
    for case in dict.fromkeys(case for case, _ in cells):
        shown = (cells.get((case, measure)) for measure in measures)
        yield f"| {_plain(case)} | {' | '.join('' if row is None else _marked(row) for row in shown)} |"


def _marked(row: dict[str, Any]) -> str:
    return _value(row) if row["met"] else f"**{_value(row)}**"


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:,.3f}" if row["unit"] == "ratio" else f"{row['value']:,.0f} {row['unit']}"


def _row_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "| measured | value | goal | |"
    yield "|---|---|---|---|"
    for row in rows:
        verdict = "" if row["met"] is None else "met" if row["met"] else "**not met**"
        yield f"| {_plain(row['name'])} | {_value(row)} | {row['goal'] or ''} | {verdict} |"


def _map(root: Path, name: str) -> dict[str, Any] | None:
    path = root / RESULTS / name / "plane.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _asked(root: Path, name: str) -> Iterator[str]:
    """What a map answers to the question about one of its ties, task by task."""
    found = _map(root, name)
    if found is None:
        yield f"Not measured yet: no result of the study `{name}` has been kept."
        return
    for sentence in found["question"]["sentences"]:
        yield f"- {_plain(sentence)}"


def _plane(page: Path, root: Path, name: str) -> Iterator[str]:
    """The picture of a map, and for the loss of each task: which regions are good, how many steps are cliffs, and the highest of them."""
    found = _map(root, name)
    if found is None:
        yield f"No result of the study `{name}` has been kept yet."
        return
    folder = _link(page, root, name)
    yield f"[![The plane of ties: a disc for each task, a mark for each tie, pale where the loss is low, red where a cliff is]({folder}/plane.svg)]({folder}/plane.html)"
    for sheet in found["sheets"]:
        if sheet["is_loss"]:
            yield ""
            yield f"**{_plain(sheet['title'])}.** " + " ".join(_plain(sentence) for sentence in sheet["sentences"])
            yield from ["", "The highest:", ""] if sheet["cliffs"] else []
            yield from (f"- {_plain(cliff['text'])}" for cliff in sheet["cliffs"][:HIGHEST_CLIFFS])


def _choice(root: Path, name: str) -> Iterator[str]:
    """The best two variants within each part of the reference's cache, with the share of resamples in which each is the best."""
    section = _first_section(root, name)
    if section is None or not section.get("budgets"):
        yield f"No result of the study `{name}` has been kept yet."
        return
    yield "| of the cache | choose | its cache | loss | best in | or | its cache | loss | best in |"
    yield "|--:|---|--:|--:|--:|---|--:|--:|--:|"
    for budget in section["budgets"]:
        full = budget["cost"] / budget["share_of_reference"]
        cells = [f"{100 * budget['share_of_reference']:.4g}%"]
        for variant in (budget["variants"] + [None, None])[:2]:
            cells += ["–"] * 4 if variant is None else _chosen(section, variant, full)
        yield f"| {' | '.join(cells)} |"


def _chosen(section: dict[str, Any], variant: dict[str, Any], full: float) -> list[str]:
    certain = variant["best_in_resamples"]
    return [
        _label(section, variant["variant"]),
        f"{100 * variant['cost'] / full:.3g}%",
        _number({**variant, "mean": variant["loss"]}, signed=False),
        "–" if certain is None else f"{100 * certain:.0f}%",
    ]


def _pairs(root: Path, name: str) -> Iterator[str]:
    """Every pair that is equal in cache, parameters or operations: how much more the first loses than the second."""
    section = _first_section(root, name)
    if section is None:
        return
    for number, quantity in enumerate(dict.fromkeys(pair["within"] for pair in section["comparisons"])):
        yield from [""] if number else []
        yield f"| equal {QUANTITIES.get(quantity, quantity)} | against | difference | n |"
        yield "|---|---|--:|--:|"
        for pair in section["comparisons"]:
            shown = pair["difference"]
            if pair["within"] == quantity and shown["n"]:
                labels = (_label(section, pair["variant"]), _label(section, pair["other"]))
                yield f"| {' | '.join(labels)} | {_number(shown, signed=True)} | {shown['n']} |"


def _first_section(root: Path, name: str) -> dict[str, Any] | None:
    report = _report(root, name)
    return None if report is None else report["sections"][0]


def _label(section: dict[str, Any], name: str) -> str:
    return _plain(next(variant["label"] for variant in section["variants"] if variant["name"] == name))


def _number(shown: dict[str, Any], *, signed: bool) -> str:
    """A mean and its interval, as precise as half of the interval's width to two digits."""
    low, high = shown["low"], shown["high"]
    sign = "+" if signed else ""
    if low is None or high is None:
        return f"{shown['mean']:{sign}.3f}"
    places = max(0, 1 - math.floor(math.log10((high - low) / 2))) if high > low else 3
    texts = [f"{value:{sign}.{places}f}".replace("-", "−") for value in (shown["mean"], low, high)]
    return f"{texts[0]} \\[{texts[1]}, {texts[2]}\\]"


def _scores(page: Path, root: Path, name: str) -> Iterator[str]:
    """Of each task every variant's score and its difference in loss, then what such scores can say, and how the controls came out."""
    report = _report(root, name)
    if report is None:
        yield NOT_RUN
        return
    for section in report["sections"]:
        yield f"**{_plain(section['title'])}.**"
        yield ""
        yield f"| variant | {section['score'].replace('_', ' ')} | difference in {section['loss_metric']} | n |"
        yield "|---|--:|--:|--:|"
        for variant in section["variants"]:
            if variant["score"]["n"]:
                is_compared = not variant["is_reference"] and variant["difference"]["n"]
                difference = _number(variant["difference"], signed=True) if is_compared else "–"
                yield f"| {_plain(variant['label'])} | {_number(variant['score'], signed=False)} | {difference} | {variant['score']['n']} |"
        yield ""
        said = [*section["evidence"], *(control["text"] for control in section["controls"])]
        yield from (f"- {_plain(sentence)}" for sentence in said)
        yield ""
    yield f"[The whole report]({_link(page, root, name)}/report.md); `{report['commands']['run']}` makes it again."


def _harness(root: Path, name: str) -> Iterator[str]:
    """What ``twofold harness studies/NAME --json`` printed into ``docs/results/NAME-harness.json``."""
    path = root / RESULTS / f"{name}-harness.json"
    if not path.exists():
        yield NOT_RUN
        return
    yield "| task | variant | score | error | chance | difference | would have been seen | |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        chance, seen = (f"{row[key]:.3f}" if row[key] is not None else "–" for key in ("chance", "detectable"))
        cells = [
            _plain(f"{row['task']}, {row['metric']}"),
            _plain(row["label"]),
            _number({"mean": row["score"], "low": row["low"], "high": row["high"]}, signed=False),
            f"{row['standard_error']:.3f}",
            chance,
            _number(
                {"mean": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}, signed=True
            )
            if row["difference"]
            else "–",
            seen,
            "At chance: no information" if row["at_chance"] else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _geometry(root: Path, name: str) -> Iterator[str]:
    """Every measure of a model, beside random matrices and the model untrained."""
    found = _measured(root, name)
    if found is None:
        yield NOT_RUN
        return
    yield "| measure | here | least to most | a random one: mean and 95% range | outside it | untrained |"
    yield "|---|--:|--:|--:|--:|--:|"
    for row in found["measures"]:
        between, outside = _between(row["random"]), f"{row['outside']} of {row['of']}"
        if row["given_by_the_tie"] or not row["random"]["draws"]:
            between, outside = "the same, by the tie" if row["given_by_the_tie"] else "", ""
        cells = [
            _plain(row["name"]),
            _two(row["mean"]),
            f"{_two(row['low'])} to {_two(row['high'])}",
            between,
            outside,
            _two(row["untrained"]),
        ]
        yield f"| {' | '.join(cells)} |"


def _published(root: Path, name: str) -> Iterator[str]:
    """Figures that were published, and whether they come out."""
    found = _measured(root, name)
    if found is None:
        yield NOT_RUN
        return
    yield "| figure | published | here | means over random heads: their mean and 95% range | |"
    yield "|---|--:|--:|--:|---|"
    for one in found["published"]:
        random = {key: one[f"random_{key}"] for key in ("mean", "low", "high")}
        later = ", later" if one["later"] else ""
        yield (
            f"| {_plain(one['name'])}{later} | {one['published']} ({_two(one['published_value'])}) | {_two(one['here'])} | "
            f"{_between(random)} | {_plain(one['sentence'])} |"
        )


def _measured(root: Path, name: str) -> dict[str, Any] | None:
    path = root / RESULTS / "geometry" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _between(random: dict[str, Any]) -> str:
    return rf"{_two(random['mean'])} \[{_two(random['low'])}, {_two(random['high'])}\]"


def _two(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _link(page: Path, root: Path, name: str) -> str:
    return Path(os.path.relpath(root / RESULTS / name, page.parent)).as_posix()


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)


def take(study: Path, root: Path = ROOT) -> None:
    """Copy the report of a study folder into the results; what was there of that study goes."""
    report = study / "report"
    name = json.loads((report / "report.json").read_text(encoding="utf-8"))["study"]
    target = root / RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(report, target, ignore=shutil.ignore_patterns(".*"))


def main(arguments: list[str]) -> None:
    """Take the reports that are named, then rewrite the pages."""
    for study in arguments:
        take(Path(study))
    for page in pages():
        page.write_text(quoted(page), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
