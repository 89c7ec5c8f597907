"""Figures by which it was explained that K=V works, and whether they come out in the model at hand.

Source: arXiv:2606.04032 for trained (Q, K, V) language models of 300M parameters; "later" is the authors' own later measurement of raw
weights and activations. Neither says over what exactly it is a mean; here it is one over tokens and heads, or over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twofold.geometry.summary import Row
from twofold.report.numbers import number

NEAR = 0.1
"""A figure comes out where it differs by no more than this."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published figure and the measure that asks the same here; ``words`` is how it was published."""

    name: str
    words: str
    value: float
    key: str
    is_later: bool = False


FIGURES: tuple[Figure, ...] = (
    Figure(name="cos(K, V)", words="0.73", value=0.73, key="cos_kv"),
    Figure(name="cos(Q, K)", words="0.42", value=0.42, key="cos_qk"),
    Figure(name="cos(Q, V)", words="0.31", value=0.31, key="cos_qv"),
    Figure(name="effective rank of K", words="687 of 1024", value=687 / 1024, key="rank_k"),
    Figure(name="effective rank of V", words="702 of 1024", value=702 / 1024, key="rank_v"),
    Figure(name="effective rank of W_K", words="687 of 1024", value=687 / 1024, key="rank_wk"),
    Figure(name="effective rank of W_V", words="702 of 1024", value=702 / 1024, key="rank_wv"),
    Figure(name="cos(W_K, W_V)", words="0.0000", value=0.0, key="cos_weights", is_later=True),
    Figure(name="CKA(K, V)", words="about 0.70", value=0.70, key="cka_kv", is_later=True),
)
"""The paper does not say whether its ranks are those of weights or of activations, so both are asked."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A published figure beside the model's; ``comes_out`` is None where the tie itself decides, so that nothing is asked.

    ``random_low`` and ``random_high`` are the ends of what a mean over as many random heads is.
    """

    figure: Figure
    here: float
    random_mean: float
    random_low: float
    random_high: float
    comes_out: bool | None
    is_random: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {
            "name": self.figure.name,
            "published": self.figure.words,
            "published_value": self.figure.value,
            "later": self.figure.is_later,
            "measure": self.figure.key,
        }
        return about | {name: value for name, value in vars(self).items() if name != "figure"}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One for each figure whose measure the model has."""
    by_key = {row.measure.key: row for row in rows}
    return [_verdict(figure, by_key[figure.key]) for figure in FIGURES if figure.key in by_key]


def _verdict(figure: Figure, row: Row) -> Verdict:
    """The model's mean over heads beside the same mean over random ones: both come out by one rule."""
    here, random = row.mean, row.of_mean
    comes_out = None if row.is_given else abs(here - figure.value) <= NEAR
    is_random = random.draws > 0 and random.holds(here)
    so_does_random = random.draws > 0 and abs(random.mean - figure.value) <= NEAR
    if comes_out is None:
        sentence = f"Not asked: this model's tie makes it {number(here, 2)}."
    elif comes_out and so_does_random:
        sentence = "Comes out, and so it does for random projections: it says nothing of training."
    elif comes_out:
        sentence = "Comes out, and random projections do not give it."
    elif is_random:
        sentence = "Does not come out: what is here is what random projections give."
    else:
        sentence = f"Does not come out: it is {'more' if here > random.mean else 'less'} than random projections give"
        sentence += ", which give what was published." if so_does_random else ", and not what was published."
    return Verdict(
        figure=figure,
        here=here,
        random_mean=random.mean,
        random_low=random.low,
        random_high=random.high,
        comes_out=comes_out,
        is_random=is_random,
        sentence=sentence,
    )
