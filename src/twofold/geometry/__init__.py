"""Where queries, keys and values of a trained model lie: measured against random matrices, and as a page in which they can be turned.

:func:`see` reads a text with a model (:func:`~twofold.geometry.reading.open_model`) and measures; :func:`~twofold.geometry.page.html` is the page.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Any

import torch
import transformers
from torch import Tensor

from twofold._version import __version__
from twofold.errors import TwofoldError
from twofold.geometry.capture import Layer
from twofold.geometry.paper import Verdict, verdicts
from twofold.geometry.points import HeadPoints, head_points
from twofold.geometry.reading import Opened, open_model
from twofold.geometry.summary import Row, means, measure_layers

__all__ = ["Geometry", "Question", "open_model", "sample_text", "see"]

FORMAT = 1
MIN_TOKENS, MIN_ROW = 8, 16
MAX_HEADS = 24
"""So many heads are drawn unless others are asked for."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is read and measured.

    Of ``text`` at most ``tokens`` are read, in rows of ``context``; the first ``shown`` of them are drawn. ``layers`` and ``heads`` are counted from 0
    (none: chosen). ``draws`` is how many random heads stand beside each layer, from ``seed``.
    """

    text: str
    tokens: int = 2048
    context: int = 256
    shown: int = 128
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    draws: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model's geometry on one text."""

    opened: Opened
    question: Question
    tokens: tuple[int, ...]
    layers: tuple[Layer, ...]
    rows: tuple[Row, ...]
    has_untrained: bool

    @property
    def verdicts(self) -> list[Verdict]:
        """Published figures beside the model's."""
        return verdicts(self.rows)

    @property
    def pieces(self) -> list[str]:
        """The tokens that are drawn, as text."""
        return self.opened.pieces(self.tokens[: self.layers[0].shown.query.shape[1]])

    @cached_property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, query head) of every head that is drawn."""
        most = max(1, MAX_HEADS // len(self.layers))
        chosen = self.question.heads
        return [
            (layer.index, head) for layer in self.layers for head in (chosen or range(min(most, layer.query.shape[0])))
        ]

    def points(self, layer: int, head: int) -> HeadPoints:
        """What is drawn of a head."""
        return head_points(next(one for one in self.layers if one.index == layer), head)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, for programs."""
        model = self.opened
        return {
            "format": FORMAT,
            "model": {
                "name": model.name,
                "class": type(model.model).__name__,
                "ties": [layer.tie for layer in self.layers],
                "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
                "weights_sha256": model.digest,
            },
            "run": dict(model.run),
            "text": {
                "sha256": hashlib.sha256(self.question.text.encode()).hexdigest(),
                "tokens": len(self.tokens),
                "context": self.layers[0].row,
                "shown": len(self.pieces),
            },
            "layers": [layer.index for layer in self.layers],
            "draws": self.question.draws,
            "seed": self.question.seed,
            "untrained": self.has_untrained,
            "measures": [row.to_dict() for row in self.rows],
            "published": [verdict.to_dict() for verdict in self.verdicts],
            "versions": {
                "twofold": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def see(opened: Opened, question: Question) -> Geometry:
    """Read the text, measure the layers, and the same in random matrices and in an untrained model.

    Raises TwofoldError for a text that is too short, a layer or head that there is not, and a layer that cannot be shown.
    """
    tokens = opened.codec.encode(question.text)[: question.tokens]
    rows = _rows(tokens, min(question.context, opened.max_tokens or question.context))
    asked = opened.layers(question.layers)
    layers = opened.read(rows, asked, shown=question.shown)
    _check_heads(layers, question.heads)
    untrained = opened.read_untrained(rows, asked, shown=question.shown)
    beside = {} if untrained is None else means(untrained)
    measured = measure_layers(layers, draws=question.draws, seed=question.seed)
    return Geometry(
        opened=opened,
        question=question,
        tokens=tuple(token for row in rows for token in row.tolist()),
        layers=tuple(layers),
        rows=tuple(replace(row, untrained=beside.get(row.measure.key, row.untrained)) for row in measured),
        has_untrained=untrained is not None,
    )


def sample_text() -> str:
    """The text that is read where none is given: Python and English, with names that come again."""
    return (resources.files("twofold.geometry") / "sample.txt").read_text(encoding="utf-8")


def _rows(tokens: Sequence[int], context: int) -> list[Tensor]:
    """Rows of ``context`` tokens; a short rest is left out, unless it is all there is."""
    if len(tokens) < MIN_TOKENS:
        raise TwofoldError(
            f"The text has {len(tokens)} tokens, too few to see anything in: give one of at least {MIN_TOKENS}."
        )
    rows = torch.tensor(tokens).split(max(context, MIN_TOKENS))
    return [row for index, row in enumerate(rows) if not index or len(row) >= MIN_ROW]


def _check_heads(layers: Sequence[Layer], heads: Sequence[int]) -> None:
    count = min(layer.query.shape[0] for layer in layers)
    for head in heads:
        if not 0 <= head < count:
            raise TwofoldError(f"There is no head {head}: the {count} query heads are counted from 0 to {count - 1}.")
