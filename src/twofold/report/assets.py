"""Styles, scripts and templates of pages: read from the packages that hold them, once."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

REPORT = "twofold.report"


@cache
def environment(package: str = REPORT) -> Environment:
    """Templates of a package, which may build on those of reports; a name that is not given is an error."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, REPORT))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def text_of(name: str, package: str = REPORT) -> str:
    """The text of a file of a package."""
    return (resources.files(package) / name).read_text(encoding="utf-8")
