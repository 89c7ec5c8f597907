"""Numbers, axes, labels, colours and sentences of the report: laws, and liars that break them."""

from __future__ import annotations

import doctest
import math
import re
from importlib import resources
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from twofold.report import answer, drawing, frontier, markers, numbers
from twofold.study.statistics import Interval, PairedDifference, paired_difference

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


def difference(mean: float, low: float, high: float, n: int = 3) -> PairedDifference:
    return PairedDifference(
        mean=mean, low=low, high=high, n=n, method="", bootstrap_low=low, bootstrap_high=high, bootstrap_method=""
    )


@pytest.mark.parametrize("module", [drawing, numbers])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# Numbers


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (1.28341, 1.2710, 1.2958, "1.283 [1.271, 1.296]"),
        (0.5, 0.2, 0.8, "0.50 [0.20, 0.80]"),
        (-0.0004, -0.0031, 0.0023, "−0.0004 [−0.0031, 0.0023]"),
        (12345.6, 12000.0, 12691.2, "12,346 [12,000, 12,691]"),
        (0.123456, math.nan, math.nan, "0.1235"),
    ],
)
def test_digits_follow_the_interval(mean, low, high, text):
    assert numbers.with_interval(Interval(mean=mean, low=low, high=high, n=3, method="")) == text


def test_nothing_measured_is_a_dash():
    assert numbers.with_interval(Interval(mean=math.nan, low=math.nan, high=math.nan, n=0, method="")) == "–"


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert numbers.number(-0.0001, 2, sign=True) == "0.00"


@given(FINITE, st.floats(1e-6, 1e3))
def test_what_is_shown_is_within_a_twentieth_of_the_interval(mean, half):
    shown = Interval(mean=mean, low=mean - half, high=mean + half, n=3, method="")
    text = numbers.mean(shown).replace("−", "-").replace(",", "")
    places = numbers.decimals(shown.low, shown.high, mean)
    assert abs(float(text) - mean) <= max(0.051 * half, 0.5000001 * 10.0**-places if places in (0, 6) else 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.999, ">99%"), (1.0, "100%"), (0.0, "0%"), (0.001, "<1%"), (0.5, "50%"), (math.nan, "–")],
)
def test_a_share_is_never_rounded_to_certainty(value, text):
    assert numbers.share(value) == text


@pytest.mark.parametrize(("count", "text"), [(768, "768 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**21, "2 MiB")])
def test_bytes(count, text):
    assert numbers.byte_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (12.2, "12 s"), (180, "3 min"), (3900, "1 h 5 min"), (7200, "2 h")]
)
def test_durations(seconds, text):
    assert numbers.duration(seconds) == text


# Sentences


def test_worse_better_and_not_told_apart():
    worse = answer.compared("A", "B", difference(0.012, 0.004, 0.020), "bits_per_byte")
    better = answer.compared("A", "B", difference(-0.012, -0.020, -0.004), "bits_per_byte")
    even = answer.compared("A", "B", difference(0.002, -0.010, 0.014), "loss")
    assert worse.replace("\xa0", " ") == "A is worse than B by 0.0120 bits per byte [0.0040, 0.0200], n = 3"
    assert better.replace("\xa0", " ") == "A is better than B by 0.0120 bits per byte [0.0040, 0.0200], n = 3"
    assert even.replace("\xa0", " ") == "A is not told apart from B: +0.002 nats [−0.010, +0.014], n = 3"


@given(st.dictionaries(st.integers(0, 5), FINITE, min_size=1), st.dictionaries(st.integers(0, 5), FINITE, min_size=1))
def test_no_verdict_without_an_interval_that_excludes_zero(a, b):
    found = paired_difference(a, b)
    if found.n:
        sentence = answer.compared("A", "B", found, "loss")
        assert found.excludes_zero == bool(re.search("better|worse", sentence))


# Axes


@given(FINITE, st.floats(1e-5, 1e6))
def test_linear_ticks_lie_on_the_axis_and_are_few(low, length):
    ticks = drawing.linear_ticks(low, low + length)
    slack = 1e-6 * max(length, abs(low))
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)
    assert 1 <= len(ticks) <= 12


@given(st.floats(1e-6, 1e6), st.floats(1.05, 1e6))
def test_logarithmic_ticks_lie_on_the_axis_and_rise(low, factor):
    ticks = drawing.log_ticks(low, low * factor)
    assert ticks == sorted(set(ticks))
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)
    assert len(ticks) <= 14


@given(st.floats(1, 1e6), st.floats(1.1, 1e4), st.floats(0, 1), st.booleans())
def test_a_scale_maps_its_ends_to_the_pixels_of_its_ends(low, factor, share, is_log):
    scale = drawing.Scale(low=low, high=low * factor, start=60, end=800, is_log=is_log)
    assert scale(low) == pytest.approx(60)
    assert scale(low * factor) == pytest.approx(800)
    assert 59.99 <= scale(low * (1 + share * (factor - 1))) <= 800.01


def test_one_that_fails_does_not_press_the_others_into_a_line():
    low, high = drawing.fences([1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 9.0])
    assert low < 1.0
    assert 1.1 < high < 9.0
    assert drawing.fences([1.0, 9.0]) == (-math.inf, math.inf)


@given(st.lists(st.tuples(FINITE, st.floats(0, 1e6)), min_size=1, max_size=12), st.sampled_from([1.5, 6]))
def test_an_axis_holds_all_means_and_is_not_ruled_by_huge_intervals(values, most):
    means = [mean for mean, _ in values]
    low, high = drawing.span(means, [(mean - half, mean + half) for mean, half in values], most=most)
    assert low < min(means) <= max(means) < high
    spread = (max(means) - min(means)) or 0.1 * abs(means[0]) or 1.0
    assert high - low <= 1.2 * (1 + 2 * most) * spread


def test_an_axis_without_intervals_holds_the_means_alone():
    low, high = drawing.span([1.0, 2.0], [(math.nan, math.nan)] * 2, most=1.5)
    assert (low, high) == pytest.approx((0.95, 2.05))


# Labels

POINTS = st.lists(
    st.tuples(st.integers(60, 800), st.integers(40, 380), st.text("QKV=, ()", min_size=2, max_size=24)),
    min_size=1,
    max_size=16,
)


@given(POINTS)
def test_labels_stay_in_the_figure_and_touch_nothing(points):
    anchors = [markers.Anchor(x=x, y=y, text=text) for x, y, text in points]
    obstacles = [markers.Box(left=x - 7, right=x + 7, top=y - 7, bottom=y + 7) for x, y, _ in points]
    room = markers.Box(left=50, right=880, top=20, bottom=420)
    placed = markers.place(anchors, obstacles, [], room)
    boxes = [label.box for label in placed.values()]
    for index, label in placed.items():
        own = label.box.distance(*points[index][:2])
        assert all(label.box.distance(x, y) > own for other, (x, y, _) in enumerate(points) if other != index)
    assert all(box.inside(room) for box in boxes)
    assert not any(box.meets(other) for box in boxes for other in obstacles)
    assert not any(a.meets(b) for index, a in enumerate(boxes) for b in boxes[:index])


def test_labels_keep_off_the_front_where_they_can():
    anchor = markers.Anchor(x=400, y=200, text="(Q, K=V)")
    line = markers.Box(left=400, right=880, top=198, bottom=202)
    room = markers.Box(left=50, right=880, top=20, bottom=420)
    assert not markers.place([anchor], [], [line], room)[0].box.meets(line)
    assert markers.place([anchor], [], [room], room)  # but rather on a line than nowhere


@pytest.mark.parametrize("width", [344, 880])
@pytest.mark.parametrize("longest", [5, 40, 60])
def test_what_numbers_stand_for_ends_within_the_figure(width: float, longest: int):
    labels = ["x" * length for length in (4, 3, longest, 5)]
    points = [
        frontier._Point(variant=SimpleNamespace(label=label, kind="tie", is_reference=False), x=0.0, column=0.0, y=0.0, is_beyond=False)
        for label in labels
    ]  # fmt: skip
    drawn = str(Markup().join(frontier._key(points, width, 400.0)))
    for label in labels:
        found = re.search(rf'<text x="([\d.]+)"[^>]*>{label}<', drawn)
        assert found
        assert float(found[1]) + drawing.text_width(label, markers.LABEL_SIZE) <= max(width, 40 + drawing.text_width(label, markers.LABEL_SIZE))  # fmt: skip
    assert float(max(re.findall(r' y="([\d.]+)"', drawn), key=float)) <= 400 + frontier._key_height(points, width)


def test_boxes_that_overlap_are_found():
    box = markers.Box(left=0, right=10, top=0, bottom=10)
    assert box.meets(markers.Box(left=9, right=20, top=9, bottom=20))
    assert not box.meets(markers.Box(left=10, right=20, top=0, bottom=10))


# Colours


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def palette() -> dict[str, tuple[str, str]]:
    """Name -> (light, dark)."""
    files = resources.files("twofold.report")
    css = "".join((files / name).read_text() for name in ("figure.css", "style.css"))
    return {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    }


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_is_enough_for_text_and_for_marks(theme):
    colours = {name: pair[theme] for name, pair in palette().items()}
    for ground in ("ground", "soft"):
        for text in ("ink", "quiet", "tie", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    marks = ["control", "focus", *(f"colour-{index}" for index in range(9))]
    for mark in marks:
        assert contrast(colours[mark], colours["ground"]) >= 3, mark
    assert contrast("#777777", "#888888") < 3  # the measure can fail


def test_text_becomes_no_markup():
    assert str(drawing.tag("text", "<b>&", title='"')) == '<text title="&#34;">&lt;b&gt;&amp;</text>'
