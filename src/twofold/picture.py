"""An explanation drawn in a terminal: the tie as a circuit, its facts, and what it costs beside ordinary attention.

Everything is made of Rich renderables, so width, colour and pipes are Rich's business; where a terminal cannot show a character, every
sign has a plain counterpart (:func:`plain`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from twofold.explain import Cost, Explanation, TieFacts
from twofold.spec import ModelSpec
from twofold.tie import ROLES

LABEL = "bold cyan"
QUIET = "dim"

_PLAIN = str.maketrans(
    {"─": "-", "│": "|", "▶": ">", "●": "o", "ᵀ": "^T", "√": "sqrt ", "·": "*", "×": "x", "→": "->", "−": "-"}
    | dict.fromkeys("┌└├┬┴┤┼", "+")
    | dict.fromkeys("⎡⎢⎣", "[")
    | dict.fromkeys("⎤⎥⎦", "]")
)


def plain(text: str) -> str:
    """The same in ASCII, for terminals and files that hold nothing else."""
    return text.translate(_PLAIN)


class _Signs:
    """Text that falls back to ASCII where the output cannot show its signs."""

    def __init__(self, text: str | Text) -> None:
        self.text = text if isinstance(text, Text) else Text(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(plain(self.text.plain), style=self.text.style) if options.ascii_only else self.text


# The circuit: x, the free projections, the roles made of them, and what is kept.


def circuit(facts: TieFacts) -> list[str]:
    r"""The tie as wires. A dot is a joint; wires that cross without one do not touch.

    >>> from twofold.explain import facts_of
    >>> from twofold.tie import Tie
    >>> print("\n".join(circuit(facts_of(Tie.parse("V = Q - K")))))
         ┌─▶ W_Q ─●─────▶ Q
    x ───┤        │
         └─▶ W_K ─┼─●───▶ K         ──▶ cache
                  │ │
                  └─┴───▶ V = Q - K ──▶ cache
    """
    sources = [2 * ROLES.index(name) for name in facts.free_projections]
    buses = _buses(facts)
    width = max(len(role) for role in facts.roles)
    lines = []
    for line in range(5):
        text = _trunk(line, sources)
        wires = "".join(_bus(bus, line, line in sources) for bus in buses)
        if line % 2:
            text += " " * 8 + wires
        else:
            role, name = ROLES[line // 2], facts.roles[line // 2]
            arrow = " ──▶ cache" if role in facts.cached_roles else ""
            text += (f"─▶ W_{role} ─" if line in sources else " " * 8) + f"{wires}──▶ {name:{width}}{arrow}"
        lines.append(text.rstrip())
    return lines


def _buses(facts: TieFacts) -> list[tuple[int, int, bool]]:
    """(first line, last line, is leftmost) of the wire down from each free projection that a derived role uses."""
    spans = []
    for column, name in enumerate(facts.free_projections):
        users = [
            2 * row for row, numbers in enumerate(facts.matrix) if "=" in facts.roles[row] and numbers[column] != "0"
        ]
        if users:
            spans.append((2 * ROLES.index(name), max(users)))
    return [(first, last, index == 0) for index, (first, last) in enumerate(spans)]


def _bus(bus: tuple[int, int, bool], line: int, is_source: bool) -> str:
    first, last, is_leftmost = bus
    inside = first <= line <= last
    if line % 2:
        return "│ " if inside else "  "
    if is_source:
        return "●─" if line == first else "┼─" if inside else "──"
    if line < last:
        return "├─"
    return "└─" if is_leftmost else "┴─"


def _trunk(line: int, sources: list[int]) -> str:
    """``x`` and the branches from it to the projections."""
    first, last = sources[0], sources[-1]
    entry = (first + last) // 2
    left = "x ───" if line == entry else "     "
    if not first <= line <= last:
        return left + " "
    if first == last:
        return left + "─"
    if line not in sources:
        return left + ("┤" if line == entry else "│")
    return left + ("┌" if line == first else "└" if line == last else "┼" if line == entry else "├")


def matrix(facts: TieFacts) -> list[str]:
    """[Q; K; V] = M · [the free projections of x], with tall brackets."""
    widths = [max(len(row[column]) for row in facts.matrix) for column in range(len(facts.free_projections))]
    rows = [" ".join(f"{number:>{width}}" for number, width in zip(row, widths, strict=True)) for row in facts.matrix]
    vector = [f"[ W_{name} x ]" for name in facts.free_projections]
    vector = (["", *vector] if len(vector) == 1 else vector) + [""]
    return [
        f"{'⎡⎢⎣'[i]} {role} {'⎤⎥⎦'[i]} {'=' if i == 1 else ' '} {'⎡⎢⎣'[i]} {rows[i]} {'⎤⎥⎦'[i]} {vector[i]}".rstrip()
        for i, role in enumerate(ROLES)
    ]


# One explanation on a page


def page(explanation: Explanation, reference: Explanation, model: ModelSpec, caption: str) -> RenderableType:
    """Everything about one text: each of its ties, and the cost of the whole in the model beside the reference's."""
    parts: list[RenderableType] = []
    if len(explanation.ties) > 1 or len(explanation.layers) > 1:
        parts += [_Signs(Text(explanation.pattern, style="bold")), _Signs(layers_text(explanation, model)), Text()]
    for facts in explanation.ties:
        parts += [_facts(facts), Text()]
    parts += [_Signs(Text(note, style="yellow")) for note in explanation.notes]
    parts += [Text()] * bool(explanation.notes)
    if explanation.cost and reference.cost:
        parts += [_Signs(Text(caption, style="bold")), _cost_table(explanation, reference)]
    else:
        parts += [Text(explanation.refusal, style="red")]
    return Group(*parts)


def layers_text(explanation: Explanation, model: ModelSpec) -> str:
    """Which layers have which tie: ``3 layers of (Q, K, V), 1 layer of (Q, K=V); 5 times over``."""
    counted = [f"{count} layer{'s' * (count > 1)} of {tie}" for count, tie in explanation.layers]
    period = sum(count for count, _ in explanation.layers)
    return f"{', then '.join(counted)}; repeated over the {model.num_hidden_layers} layers, {period} at a time."


def _facts(facts: TieFacts) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=LABEL, no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("equations", "; ".join(facts.equations) or "none"),
        ("matrix", "\n".join(matrix(facts))),
        ("output", facts.output),
        ("weights", facts.weights),
        ("cache", facts.cache),
        ("logits", facts.logits),
        ("heads", facts.heads),
    ]
    for label, words in rows:
        table.add_row(label, _Signs(words))
    for remark in facts.remarks:
        table.add_row("", _Signs(Text(remark, style="italic")))
    title = Text.assemble((facts.tie, "bold"), "  ", (facts.meaning, QUIET))
    picture = Padding(_Signs("\n".join(circuit(facts))), (1, 0, 1, 2))
    return Group(_Signs(title), picture, Padding(table, (0, 0, 0, 2)))


# Costs


def count_text(number: float) -> str:
    """``305.5M``: three or four digits and a decimal unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.{1 if number >= 10 * size else 2}f}{unit}"
    return f"{number:.0f}"


def bytes_text(number: int) -> str:
    """``1.25 GiB``: binary units, named as such."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.{1 if number >= 10 * size else 2}f} {unit}"
    return f"{number} B"


def change_text(number: float, reference: float) -> str:
    """``-50.0%``, or ``same``."""
    change = f"{100 * (number / reference - 1):+.1f}%"
    return "same" if number == reference else change


def caption(model: ModelSpec, name: str, *, tokens: int, dtype: str) -> str:
    """The model and the cache that the costs belong to, in a line or two."""
    heads = f"{model.num_attention_heads} query and {model.num_key_value_heads} KV heads of {model.head_dim}"
    text = f"Cost in {name}: {model.num_hidden_layers} layers of {model.hidden_size}, {heads}, {dtype}"
    limit = model.positions.max_positions
    return text + (f"\n(Its learned positions end at {limit:,} tokens.)" if 0 < limit < tokens else "")


def _cost_rows(cost: Cost) -> list[tuple[str, str, float]]:
    tokens = cost.tokens
    rows: list[tuple[str, str, float]] = [
        ("parameters", count_text(cost.parameters), cost.parameters),
        ("  of attention", count_text(cost.attention_parameters), cost.attention_parameters),
        ("cache per token", bytes_text(cost.cached_bytes_per_token), cost.cached_bytes_per_token),
        (f"cache at {tokens:,} tokens", bytes_text(cost.cache_bytes), cost.cache_bytes),
    ]
    if cost.decode_flops_per_token:
        rows.append(("operations per new token", count_text(cost.decode_flops_per_token), cost.decode_flops_per_token))
    return rows


def _cost_table(explanation: Explanation, reference: Explanation) -> Table:
    assert explanation.cost
    assert reference.cost
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style=LABEL)
    table.add_column("")
    alone = explanation.pattern == reference.pattern and explanation.cost == reference.cost
    for name in [explanation.mechanism] if alone else [reference.mechanism, explanation.mechanism, "change"]:
        table.add_column(name, justify="right", no_wrap=name == "change")
    before = _cost_rows(reference.cost)
    for (label, text, number), (_, old_text, old_number) in zip(_cost_rows(explanation.cost), before, strict=True):
        table.add_row(label, *([text] if alone else [old_text, text, change_text(number, old_number)]))
    return table


# Several ties side by side


def comparison(explanations: Sequence[Explanation], reference: Explanation, caption: str) -> RenderableType:
    """One line for each text; percentages are changes from the reference, ``(Q, K, V)`` in the same model."""
    assert reference.cost
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style=LABEL)
    for header in ("tie", "weights", "cached", "sym-\nmetric"):
        table.add_column(header)
    for header in ("parameters", "cache\nper token", f"cache at\n{reference.cost.tokens:,}"):
        table.add_column(header, justify="right", no_wrap=True)
    notes = []
    for explanation in explanations:
        name = explanation.mechanism.replace(" | ", " |\n").replace("; ", ";\n")
        table.add_row(name, *_mixed_facts(explanation), *_mixed_costs(explanation, reference.cost))
        notes += [f"{explanation.pattern}: {note}" for note in (*explanation.notes, explanation.refusal) if note]
    words = [_Signs(Text(note, style="yellow")) for note in notes]
    return Group(_Signs(Text(caption, style="bold")), table, *words)


def _mixed_facts(explanation: Explanation) -> tuple[str, str, str]:
    """Facts that the ties of a pattern share; ``2 | 1`` where they do not."""

    def joined(values: list[str]) -> str:
        return " |\n".join(dict.fromkeys(values))

    return (
        joined([" ".join(facts.free_projections) for facts in explanation.ties]),
        joined([" ".join(facts.cached_roles) for facts in explanation.ties]),
        joined(["yes" if facts.is_symmetric else "no" for facts in explanation.ties]),
    )


def _mixed_costs(explanation: Explanation, reference: Cost) -> tuple[str, str, str]:
    cost = explanation.cost
    if cost is None:
        return "-", "-", "-"
    return (
        f"{count_text(cost.parameters)}\n{change_text(cost.parameters, reference.parameters)}",
        f"{bytes_text(cost.cached_bytes_per_token)}\n"
        f"{change_text(cost.cached_bytes_per_token, reference.cached_bytes_per_token)}",
        bytes_text(cost.cache_bytes),
    )
