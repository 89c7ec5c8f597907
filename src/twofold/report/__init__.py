"""Reports: a study folder turned into one page, Markdown, tables and a picture, at any moment of the study.

The same folder gives the same bytes: nothing here looks at a clock. No torch, no network.
"""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.report import files, markdown, page, plane
from twofold.report.parts import parts
from twofold.report.summary import Summary
from twofold.storage import write_text
from twofold.study.results import Results

__all__ = ["write"]

FOLDER_NAME = "report"


def write(folder: Path) -> list[Path]:
    """Write the report of a study folder into ``folder/report`` and give the files, the page first.

    Each file is replaced whole, so a reader never meets half of one. Raises TwofoldError where the folder is no study's or cannot be
    written.
    """
    folder = Path(folder)
    summary = Summary(Results.load(folder))
    command = f"twofold study report {shlex.quote(_shown(folder, summary.results))}"
    texts = {
        "runs.csv": files.runs_csv(summary),
        "curves.csv": files.curves_csv(summary),
        "differences.csv": files.differences_csv(summary),
        "report.json": files.report_json(summary, command),
        "report.md": markdown.text(summary, command),
    }
    if summary.sections and summary.sections[0].ways:
        texts["frontier.svg"] = files.frontier_svg(summary.sections[0])
    texts |= {f"{part.name}.svg": files.part_svg(part) for part in parts(summary)}
    texts |= plane.texts(summary, command)
    target = folder / FOLDER_NAME
    try:
        target.mkdir(exist_ok=True)
        for name, text in {**texts, "index.html": page.html(summary, texts, command)}.items():
            write_text(target / name, text)
    except OSError as error:
        raise TwofoldError(
            f"The report cannot be written to {target} ({error.strerror or error}): make room or choose a folder that can be written."
        ) from None
    return [target / name for name in ("index.html", *texts)]


def _shown(folder: Path, results: Results) -> str:
    """The folder as the command names it: as it was given to the study, else where studies lie; not where it is on this machine."""
    name = folder.resolve().name
    words = shlex.split(str(results.provenance.get("command") or ""))
    given = [word for before, word in itertools.pairwise(words) if before == "--folder" and Path(word).name == name]
    return given[0] if given else f"studies/{name}" if folder.resolve().parent.name == "studies" else name
