"""What a run tells while it trains, and what is left when it has ended; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after ``step`` of its ``steps``.

    ``loss`` is the mean training loss since the last line of metrics.jsonl, in nats per prediction. ``seconds`` were spent on training steps (over
    all resumptions; evaluation and checkpoints are not counted), ``tokens_per_second`` is the rate since the last report, ``seconds_left``
    what remains at the pace of this session, evaluation and checkpoints included. ``scores`` are those of the held-out data, empty unless
    they were just taken.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    seconds: float
    tokens_per_second: float
    seconds_left: float
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run: held-out ``scores`` of the last weights, and what they took.

    ``tokens`` were trained on in ``seconds``, evaluation and checkpoints left out. ``data_hash`` is the SHA-256 of the task's data, and
    ``data_order`` that of the examples' indices in the order in which they were trained on (empty in outcomes from before it was kept).
    """

    scores: Mapping[str, float]
    parameters: int
    seconds: float
    tokens: int
    cached_floats_per_token: int
    data_hash: str
    data_order: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the content of outcome.json; :meth:`from_dict` gives the same outcome back."""
        return asdict(self) | {"scores": dict(self.scores)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """An outcome from :meth:`to_dict`'s fields. Raises KeyError where one is missing."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.default is MISSING or f.name in values})
