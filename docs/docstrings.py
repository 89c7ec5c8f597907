"""Docstrings as Markdown: MkDocs is told what Python's own conventions mean.

Examples become blocks of code, references such as :class:`~twofold.tie.Tie` the name that they end in, and brackets of a formula, ``[q ; p][k ; r]``,
are no link.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")


class Docstrings(Extension):
    """Rewrites each docstring when it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The same docstring in Markdown."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in re.split(r"\n[ ]*\n", text))


def _paragraph(text: str) -> str:
    if text.lstrip().startswith(">>>"):
        return f"```pycon\n{text}\n```"
    text = _ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", text)
    return text if text.startswith("    ") else text.replace("][", "]\\[")
