"""The page of claims, ``docs/claims.md``: made from results, the same for the same results, never edited."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from twofold.claims.claim import TOPICS
from twofold.claims.controls import Control, controls, likelihood
from twofold.claims.kept import Kept
from twofold.claims.measured import Origin
from twofold.claims.verdict import VERDICTS, Judgement, Verdict, counts
from twofold.claims.wording import power, result, rule, short_result, tally
from twofold.report.markdown import escape
from twofold.report.numbers import share

ASKED = {"paper": "paper", "authors later": "its authors, later", "readers": "its readers"}
MEANING: dict[Verdict, str] = {
    "confirmed at this scale": "every result satisfies its rule with the whole of its 95% interval (what was counted or measured once has none: as it is)",
    "refuted at this scale": "every result contradicts its rule, likewise",
    "mixed": "the results do not all come out alike: some confirmed, some refuted, some undecided",
    "undecided": "the interval holds both answers; the last column of the details says what would have been seen",
    "not tested": "no result is kept; the command that would test it is named",
}
INTRODUCTION = (
    "Every quantitative claim of the paper ([arXiv:2606.04032](https://arxiv.org/abs/2606.04032)) and of its authors later, and every question of its "
    "readers, beside what was run here. Nothing on this page is written by hand: statements and rules are data, in `src/twofold/claims/data/`, and "
    "results are read from the reports. `twofold claims --markdown docs/claims.md` makes the page again, `twofold claims ID` shows one claim, "
    "and a test fails where the page and the results disagree.",
    "What was run here is small: byte models and made-up tasks that two cores train in seconds or minutes. “At this scale” is "
    "meant literally: a claim about 300M parameters can be confirmed or refuted here only for models like these.",
    "A claim may have several rules. A verdict “in part” rests on those of them whose results are kept. A rule is judged on 95% intervals of Student's t over seeds; differences are paired by seed. What was *measured once*, the figures of one trained model or the ratio of two times, has no interval: it is judged as it is, and another model or another hour may give another number. Student's t takes seeds to lie around their mean: where a model learns a task or does not, three seeds may all fall on one side, and the interval misses one time in four. With so many intervals about one in twenty "
    "misses the truth by chance alone. *Would have been seen* is the smallest true difference that such a study finds four times in five, given "
    "its number of seeds and their spread. Percentages of perplexity are compared as lengths of code: +3.1% perplexity at 5.11 is +1.9% of the loss, "
    "and a relative difference of losses does not depend on the unit, be it nats per token or bits per byte.",
)


def text(judgements: Sequence[Judgement], kept: Kept, page: Path) -> str:
    """The whole page, whose links lead from ``page`` to the files of ``kept``."""
    link = _Link(kept, page)
    parts = [
        "# Claims, one by one",
        "<!-- Made by `twofold claims --markdown docs/claims.md`: do not edit. -->",
        *INTRODUCTION,
    ]
    parts += ["## Summary", "\n".join(_summary(judgements))]
    parts += ["## Controls", *_controls(controls(kept))]
    for topic, heading in TOPICS.items():
        of_topic = [judgement for judgement in judgements if judgement.claim.topic == topic]
        if of_topic:
            parts += [f"## {heading}", "\n".join(_overview(of_topic))]
            for judgement in of_topic:
                parts += _details(judgement, link)
    return "\n\n".join(parts) + "\n"


class _Link:
    """Paths of result files as seen from the page."""

    def __init__(self, kept: Kept, page: Path) -> None:
        self._folder, self._page = kept.folder, page

    def __call__(self, origin: Origin) -> str:
        if not origin.page:
            return "counted"
        target = os.path.relpath(self._folder / origin.page, self._page.parent)
        return f"[{escape(origin.page.split('/')[0].removesuffix('.json'))}]({Path(target).as_posix()})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose cells are Markdown already."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _summary(judgements: Sequence[Judgement]) -> Iterator[str]:
    askers = list(ASKED)
    rows = []
    for verdict in VERDICTS:
        of_verdict = [judgement for judgement in judgements if judgement.verdict == verdict]
        of_askers = [str(sum(j.claim.asked_by == asker for j in of_verdict)) for asker in askers]
        rows.append([f"**{verdict}**", MEANING[verdict], *of_askers, str(len(of_verdict))])
    totals = [str(sum(j.claim.asked_by == asker for j in judgements)) for asker in askers]
    rows.append(["all", "", *totals, str(sum(counts(judgements).values()))])
    return iter(_table(["verdict", "meaning", *(ASKED[asker] for asker in askers), "all"], rows))


def _controls(found: Sequence[Control]) -> Iterator[str]:
    negative = [control for control in found if control.outcome == "same"]
    positive = [control for control in found if control.outcome == "worse"]
    if not found:
        yield "No study with a negative or a positive control is kept yet."
        return
    held = sum(control.holds for control in negative)
    yield (
        f"**Negative controls**, the reference trained again from other seeds: {held} of {len(negative)} intervals straddle zero"
        f"{f' ({share(held / len(negative))})' if negative else ''}; 95% are stated. If each did so with 95%, so few would be seen "
        f"in {share(likelihood(held, len(negative)))} of such collections. (Some share runs with others, so they are not quite independent.)"
    )
    held = sum(control.holds for control in positive)
    yield f"**Positive controls**, models known to fail: {held} of {len(positive)} are found worse, with an interval that excludes zero."
    rows = []
    for study in dict.fromkeys(control.study for control in found):
        cells = [study]
        for group in (negative, positive):
            own = [control for control in group if control.study == study]
            cells.append(f"{sum(control.holds for control in own)} of {len(own)}" if own else "–")
        rows.append(cells)
    yield "\n".join(_table(["study", "negative controls that straddle zero", "positive controls found worse"], rows))
    failed = [control for control in found if not control.holds]
    if failed:
        yield "Not as promised:"
        yield "\n".join(
            f"- {escape(f'{control.study}, {control.measured.what}')}: {escape(result(control.measured))}"
            for control in failed
        )


def _overview(judgements: Sequence[Judgement]) -> list[str]:
    rows = [
        [
            f"[{escape(judgement.claim.short)}](#{judgement.claim.id})",
            ASKED[judgement.claim.asked_by],
            f"**{judgement.verdict}**{', in part' if judgement.is_partial else ''}",
            escape(short_result(judgement)),
        ]
        for judgement in judgements
    ]
    return _table(["claim", "asked by", "verdict", "result"], rows)


def _details(judgement: Judgement, link: _Link) -> Iterator[str]:
    claim = judgement.claim
    yield f'### <a id="{claim.id}"></a>{escape(claim.short)}'
    yield f"{escape(claim.statement)} (*{escape(claim.source)}*)"
    if claim.note:
        yield escape(claim.note)
    yield f"Verdict: **{judgement.verdict}**{_qualified(judgement)}."
    if judgement.checks:
        rows = [
            [
                escape(check.evidence.says or check.measured.what),
                escape(rule(check.evidence)),
                escape(result(check.measured)),
                check.outcome + (f": {escape(check.measured.doubt)}" if check.measured.doubt else ""),
                escape(power(check)),
                link(check.measured.origin),
            ]
            for check in judgement.checks
        ]
        yield "\n".join(_table(["measured", "confirmed if", "result", "so", "would have been seen", "from"], rows))
    lines = [f"- {escape(reason)}: `{command}`" for reason, command in judgement.missing]
    lines += [f"- would be tested by `{claim.test}`"] if claim.test else []
    if not judgement.checks and not lines:
        lines.append("- nothing in this version tests it")
    lines += _origins(judgement)
    yield "\n".join(lines)


def _qualified(judgement: Judgement) -> str:
    counted = tally(judgement)
    part = ", by a part of the evidence: other results are not there yet" if judgement.is_partial else ""
    return f"{f' ({counted})' if counted else ''}{part}"


def _origins(judgement: Judgement) -> Iterator[str]:
    """What was run, once per file that was read."""
    seen = dict.fromkeys(check.measured.origin for check in judgement.checks)
    for origin in seen:
        facts = [f"made by `{origin.command}`"]
        facts += [f"code {escape(origin.code)}"] if origin.code else []
        facts += [f"data {escape(origin.data)}"] if origin.data else []
        facts += [escape(origin.machine)] if origin.machine else []
        facts += [f"file {origin.digest}"] if origin.digest else []
        facts += [f"**{escape(told)}**" for told in (origin.state, origin.caution) if told]
        yield "- " + "; ".join(facts)
