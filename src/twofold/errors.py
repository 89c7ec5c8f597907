"""The errors that are a user's to mend: one sentence each, shown without a traceback on the command line."""

from __future__ import annotations

import re


class TwofoldError(Exception):
    """A user's mistake, told in one sentence: what was wrong, where, and what to do."""


class TieError(TwofoldError, ValueError):
    """A tie that cannot be read, with the place that is wrong.

    ``str(error)`` is the sentence, the text, and a caret under ``text[position]``.
    """

    def __init__(self, sentence: str, text: str, position: int) -> None:
        self.sentence = sentence
        self.text = text
        self.position = position
        # The caret points into one line: line breaks and tabs are shown as blanks, one for one.
        shown = re.sub(r"\s", " ", text)
        super().__init__(f"{sentence}\n  {shown}\n  {' ' * position}^")
