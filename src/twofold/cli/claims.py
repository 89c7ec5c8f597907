"""``twofold claims``: what was claimed, and what the results make of it."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.output import Json, show, show_json
from twofold.errors import TwofoldError
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import claims, storage
    from twofold.claims import page, verdict, wording
else:
    claims, storage = Lazy("twofold.claims"), Lazy("twofold.storage")
    page, verdict, wording = (Lazy(f"twofold.claims.{name}") for name in ("page", "verdict", "wording"))

EXAMPLES = (
    Example(command="twofold claims", purpose="Every claim, its verdict and its result.", is_cheap=True),
    Example(
        command="twofold claims kv-300m",
        purpose="The whole of one: statement, source, rules, results, power, and the commands that test it.",
        is_cheap=True,
    ),
    Example(command="twofold claims --results my/results", purpose="Judged by the results of another folder."),
    Example(command="twofold claims --markdown docs/claims.md", purpose="Write the page of claims again."),
    Example(command="twofold claims --json | jq '.counts'", purpose="For programs."),
)

RESULTS = Path("docs", "results")
COLOURS = {"confirmed": "green", "refuted": "red", "mixed": "yellow", "undecided": "yellow", "not": "dim"}


def command(
    claim: Annotated[
        str | None, typer.Argument(help="The id of one claim: shows the whole of it.", show_default="all")
    ] = None,
    *,
    results: Annotated[
        Path | None, typer.Option(help="The folder that holds NAME/report.json of studies.", show_default=str(RESULTS))
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write all claims to this file as one page.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """What the paper claims and its readers ask, and what the results say: each with its rule, interval, verdict and power."""
    if results is not None and not results.is_dir():
        raise TwofoldError(
            f"There is no folder {results}: give the one that holds the studies' reports, as docs/results does."
        )
    kept = claims.Kept(results or RESULTS)
    chosen = _chosen(claim)
    judgements = [claims.judge(one, kept) for one in chosen]
    if markdown is not None:
        if claim is not None:
            raise TwofoldError("The page holds all claims: leave the id out, or --markdown.")
        _write(markdown, page.text(judgements, kept, markdown))
    if as_json:
        counts = {} if claim else {"counts": verdict.counts(judgements)}
        show_json({"results": str(kept.folder), **counts, "claims": [_as_dict(judgement) for judgement in judgements]})
    elif markdown is not None:
        typer.echo(f"{len(judgements)} claims written to {markdown}.")
    elif claim is not None:
        show(_whole(judgements[0]))
    else:
        show(_overview(judgements), _tally(judgements, kept))


def _chosen(name: str | None) -> tuple[claims.Claim, ...]:
    known = claims.load()
    if name is None:
        return known
    found = tuple(claim for claim in known if claim.id == name)
    if not found:
        near = difflib.get_close_matches(name, [claim.id for claim in known], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`twofold claims` lists them."
        raise TwofoldError(f"There is no claim {name!r}: {hint}")
    return found


def _write(path: Path, text: str) -> None:
    try:
        storage.write_text(path, text)
    except OSError as error:
        raise TwofoldError(f"{path} cannot be written ({error.strerror or error}): give another file.") from None


def _verdict(judgement: claims.Judgement) -> Text:
    words = judgement.verdict.removesuffix(" at this scale") + (", in part" if judgement.is_partial else "")
    return Text(words, style=COLOURS[judgement.verdict.split()[0]])


def _overview(judgements: list[claims.Judgement]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", style="cyan", no_wrap=True)
    for heading in ("claim", "verdict", "result"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "verdict")
    for judgement in judgements:
        claim = judgement.claim
        table.add_row(claim.id, Text(claim.short), _verdict(judgement), Text(wording.short_result(judgement)))
    return table


def _tally(judgements: list[claims.Judgement], kept: claims.Kept) -> Text:
    told = ", ".join(f"{count} {name}" for name, count in verdict.counts(judgements).items() if count)
    if not kept.studies:
        told += f"\nThere are no studies' reports in {kept.folder}: name their folder with --results"
    return Text(f"{told}. `twofold claims ID` shows the whole of one.")


def _whole(judgement: claims.Judgement) -> Group:
    claim = judgement.claim
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    counted = wording.tally(judgement)
    rows: list[tuple[str, str | Text]] = [
        ("statement", claim.statement), ("asked by", claim.asked_by), ("source", claim.source), ("note", claim.note),
        ("verdict", Text.assemble(_verdict(judgement), f" ({counted})" if counted else "")),
    ]  # fmt: skip
    rows += [("not there", f"{reason}: {made}") for reason, made in judgement.missing]
    for name, value in rows:
        if value:
            facts.add_row(name, value)
    checks: list[Table | Padding] = [Padding(_check(check), (1, 0, 0, 2)) for check in judgement.checks]
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold cyan", no_wrap=True)
    for line in judgement.commands or ("nothing in this version tests it",):
        made.add_row("command", Text(line))
    return Group(Text(f"{claim.id}: {claim.short}", style="bold"), facts, *checks, Text(), made)


def _check(check: verdict.Check) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    origin = check.measured.origin
    rows = [
        ("measured", check.evidence.says or check.measured.what), ("result", wording.result(check.measured)),
        ("confirmed if", wording.rule(check.evidence)), ("so", ": ".join(filter(None, (check.outcome, check.measured.doubt)))), ("would have been seen", wording.power(check)),
        ("code", origin.code), ("data", origin.data), ("machine", origin.machine), ("state", origin.state), ("caution", origin.caution),
        ("file", f"{origin.page} ({origin.digest})" if origin.page else ""),
    ]  # fmt: skip
    for name, value in rows:
        if value:
            table.add_row(name, Text(value))
    return table


def _as_dict(judgement: claims.Judgement) -> dict[str, Any]:
    """For programs: the claim with its rules, and each check with its numbers."""
    return {
        **judgement.claim.model_dump(exclude={"evidence"}),
        "verdict": judgement.verdict,
        "checks": [
            {
                "evidence": check.evidence.model_dump(exclude_defaults=True),
                **asdict(check.measured),
                "outcome": check.outcome,
                "power": check.power,
            }
            for check in judgement.checks
        ],
        "missing": [{"reason": reason, "command": made} for reason, made in judgement.missing],
        "commands": list(judgement.commands),
    }
