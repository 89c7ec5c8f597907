"""Parts of a report that a study's design asks for: beyond its tasks one by one, what several of them say together.

A part is found from the plan's own words, and never switched on: a study whose tasks have the axes ``size`` and ``ratio`` gets the law of the
difference (:mod:`twofold.report.law`); one whose tasks score by place gets near and far (:mod:`twofold.report.places`).
"""

from __future__ import annotations

from functools import lru_cache

from twofold.report import law, places
from twofold.report.part import Part
from twofold.report.summary import Summary

__all__ = ["Part", "parts"]


@lru_cache(maxsize=2)
def parts(summary: Summary) -> tuple[Part, ...]:
    """The parts of a report, worked out once for all of its files."""
    of_law = law.part(summary)
    return (*([] if of_law is None else [of_law]), *places.parts(summary))
