"""How numbers are written: as many digits as their uncertainty leaves, a true minus sign, units in words.

An interval of half-width w is shown to two significant digits of w, and its mean to the same place: 1.2834 ± 0.0123 is "1.283".
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from twofold.study.statistics import Interval, PairedDifference

MINUS = "−"
NOTHING = "–"
MAX_DECIMALS = 6

METRIC_NAMES = {
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats)",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}
# In a sentence a unit follows the number: "0.012 bits per byte", "0.3 nats".
METRIC_UNITS = {"loss": "nats"}


def metric_name(metric: str) -> str:
    """A metric in words, for axes and headings."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def metric_unit(metric: str) -> str:
    """A metric as the unit that follows a number in a sentence."""
    return METRIC_UNITS.get(metric, metric_name(metric))


def decimals(low: float, high: float, value: float) -> int:
    """Digits after the point that an interval leaves; without an interval, four significant digits of the value."""
    half = (high - low) / 2
    if math.isfinite(half) and half > 0:
        places = 1 - math.floor(math.log10(half))
    else:
        places = 3 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 3
    return min(max(places, 0), MAX_DECIMALS)


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with its digits, thousands set apart and a true minus.

    >>> number(-1234.5, 1), number(0.25, 2, sign=True)
    ('−1,234.5', '+0.25')
    """
    if not math.isfinite(value):
        return NOTHING
    text = f"{value:+,.{places}f}" if sign else f"{value:,.{places}f}"
    if not any(digit in "123456789" for digit in text):
        text = text.lstrip("+-")  # what rounds to zero has no sign
    return text.replace("-", MINUS)


def common_decimals(column: Iterable[Interval | PairedDifference]) -> int | None:
    """The digits that one column of a table shares: the median of what its rows would have. None for an empty column."""
    wanted = sorted(decimals(shown.low, shown.high, shown.mean) for shown in column if shown.n)
    return wanted[len(wanted) // 2] if wanted else None


def mean(shown: Interval | PairedDifference, places: int | None = None, *, sign: bool = False) -> str:
    """The mean alone; with ``places`` as its column has them, else with the digits that its interval leaves."""
    if not shown.n:
        return NOTHING
    return number(shown.mean, decimals(shown.low, shown.high, shown.mean) if places is None else places, sign=sign)


def with_interval(shown: Interval | PairedDifference, places: int | None = None, *, sign: bool = False) -> str:
    """``1.283 [1.271, 1.296]``; the bare mean where there is no interval; a dash where there is nothing.

    >>> with_interval(Interval(mean=1.28341, low=1.2710, high=1.2958, n=3, method=""))
    '1.283 [1.271, 1.296]'
    """
    return f"{mean(shown, places, sign=sign)} {bounds(shown, places, sign=sign)}".strip()


def bounds(shown: Interval | PairedDifference, places: int | None = None, *, sign: bool = False) -> str:
    """``[1.271, 1.296]``, or nothing without an interval."""
    if not math.isfinite(shown.low):
        return ""
    places = decimals(shown.low, shown.high, shown.mean) if places is None else places
    return f"[{number(shown.low, places, sign=sign)}, {number(shown.high, places, sign=sign)}]"


def byte_count(count: float) -> str:
    """Bytes in binary units, exact where they are whole: ``768 B``, ``1 KiB``, ``1.5 KiB``, ``2 MiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def count(value: float) -> str:
    """A large count in short: ``84``, ``305.5M``, ``100k``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}".removesuffix(".0") + unit
    return f"{value:,.0f}"


def share(value: float) -> str:
    """A frequency in whole percent, never rounded to a certainty that it is not: 99.9% is ``>99%``."""
    if not math.isfinite(value):
        return NOTHING
    if 0 < value < 0.01:
        return "<1%"
    if 0.99 < value < 1:
        return ">99%"
    return f"{value:.0%}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min``, ``1 h 5 min``."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
