"""The map of the plane of ties, beside the report of a study that holds one: an interactive page, a picture, and what they say as JSON."""

from __future__ import annotations

import json

from twofold.report.files import finite
from twofold.report.plane import page, words
from twofold.report.plane.sheets import sheets
from twofold.report.summary import Summary

__all__ = ["texts"]


def texts(summary: Summary, report_command: str) -> dict[str, str]:
    """The files by name; none where the study has too few ties of one equation, or none of them is measured yet."""
    found = sheets(summary)
    if not found:
        return {}
    values = finite(words.to_json(found, summary.plan.name))
    return {
        "plane.html": page.html(summary, found, report_command),
        "plane.svg": page.picture(found),
        "plane.json": json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
