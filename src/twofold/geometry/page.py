"""The page: one HTML file that holds the points of every head, and asks nobody for anything."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

from twofold.geometry import Geometry
from twofold.geometry.figure import cloud, strips
from twofold.geometry.paper import NEAR
from twofold.geometry.points import GRID, WEIGHT_UNITS
from twofold.geometry.summary import Range, Row
from twofold.report.assets import environment, text_of
from twofold.report.files import card
from twofold.report.numbers import NOTHING, number

WIDE, NARROW = 880, 344
PLACES = 2


def html(geometry: Geometry, command: str) -> str:
    """The whole page; ``command`` is what makes it again."""
    told = geometry.to_dict()
    first = first_view(geometry)
    layers = geometry.layers
    data = {
        "pieces": geometry.pieces,
        "grid": GRID,
        "units": WEIGHT_UNITS,
        "layers": [{"index": layer.index, "tie": layer.tie, "remark": layer.remark} for layer in layers],
        "heads": _heads(geometry),
        "first": {"head": geometry.heads.index(first[:2]), "token": first[2]},
    }
    ties = list(dict.fromkeys(layer.tie for layer in layers))
    return (
        environment("twofold.geometry")
        .get_template("geometry.html.j2")
        .render(
            name=geometry.opened.name,
            ties=ties,
            has_pull=any(layer.shown.weights.shape[0] > 1 for layer in layers),
            layer_names=[layer.index for layer in layers],
            near=NEAR,
            css="".join(text_of(name) for name in ("figure.css", "style.css"))
            + text_of("page.css", "twofold.geometry"),
            theme_js=text_of("theme.js"),
            furniture_js=text_of("furniture.js"),
            page_js=text_of("page.js", "twofold.geometry"),
            data=_script_safe(json.dumps(data, ensure_ascii=False, separators=(",", ":"))),
            packed=[_packed(geometry, layer, head) for layer, head in geometry.heads],
            still=cloud(geometry.points(*first[:2]), geometry.pieces, first[2]),
            strips_wide=strips(geometry.rows, WIDE),
            strips_narrow=strips(geometry.rows, NARROW),
            rows=[_row(row) for row in geometry.rows],
            verdicts=[_verdict(one) for one in told["published"]],
            has_untrained=geometry.has_untrained,
            facts=_facts(geometry, told),
            tokens=len(geometry.tokens),
            shown=len(geometry.pieces),
            draws=geometry.question.draws,
            command=command,
        )
    )


def picture(geometry: Geometry) -> str:
    """The head that the page opens with, as an SVG file of its own."""
    layer, head, token = first_view(geometry)
    return card(
        cloud(geometry.points(layer, head), geometry.pieces, token),
        has_dark=True,
        css=text_of("page.css", "twofold.geometry"),
    )


def first_view(geometry: Geometry) -> tuple[int, int, int]:
    """(layer, head, token) with the sharpest look, in the second half of the text, at a token that is neither its own nor the first."""
    best = (-math.inf, (*geometry.heads[0], 0))
    by_index = {layer.index: layer for layer in geometry.layers}
    for index, head in geometry.heads:
        weights = by_index[index].shown.weights[0, head]
        for token in range(len(weights) // 2, len(weights)):
            seen = weights[token, 1:token]
            # A weight of nearly 1 shows one line only; the most is to be seen where a few keys share it.
            sharp = -abs(float(seen.max()) - 0.6) if len(seen) else -math.inf
            if sharp > best[0]:
                best = (sharp, (index, head, token))
    return best[1]


def _packed(geometry: Geometry, layer: int, head: int) -> str:
    numbers = json.dumps(geometry.points(layer, head).packed(), separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(numbers, mtime=0)).decode()


def _heads(geometry: Geometry) -> list[dict[str, Any]]:
    places = {layer.index: place for place, layer in enumerate(geometry.layers)}
    heads = []
    for index, head in geometry.heads:
        place = places[index]
        group = geometry.layers[place].group
        measures = [
            _own(row, place, head if row.measure.per == "query head" else head // group)
            for row in geometry.rows
            if row.measure.per != "layer" and row.values[place]
        ]
        heads.append({"layer": place, "head": head, "measures": measures})
    return heads


def _own(row: Row, place: int, position: int) -> dict[str, Any]:
    value, random = row.values[place][position], row.random[place]
    return {
        "name": row.measure.name,
        "value": number(value, PLACES),
        "random": "by the tie" if row.is_given else bounds(random),
        "outside": random.draws > 0 and not random.holds(value),
    }


def bounds(random: Range) -> str:
    """``0.00 [−0.03, 0.03]``."""
    if not random.draws:
        return NOTHING
    return f"{number(random.mean, PLACES)} [{number(random.low, PLACES)}, {number(random.high, PLACES)}]"


def _row(row: Row) -> dict[str, Any]:
    values = row.all_values
    return {
        "name": row.measure.name,
        "meaning": row.measure.meaning,
        "per": row.measure.per,
        "mean": number(row.mean, PLACES),
        "range": f"{number(min(values), PLACES)} … {number(max(values), PLACES)}",
        "random": "the same, by the tie" if row.is_given else bounds(row.pooled),
        "outside": "" if row.is_given or not row.pooled.draws else f"{row.outside} of {len(values)}",
        "untrained": number(row.untrained, PLACES),
        "by_layer": [number(sum(layer) / len(layer), PLACES) if layer else NOTHING for layer in row.values],
    }


def _verdict(one: dict[str, Any]) -> dict[str, Any]:
    random = Range(mean=one["random_mean"], low=one["random_low"], high=one["random_high"], draws=1)
    return one | {
        "here": number(one["here"], PLACES),
        "random": NOTHING if one["comes_out"] is None else bounds(random),
        "kind": {None: "", True: "comes", False: "fails"}[one["comes_out"]],
        "word": {None: "not asked", True: "comes out", False: "does not"}[one["comes_out"]],
    }


def _facts(geometry: Geometry, told: dict[str, Any]) -> list[tuple[str, str]]:
    model, text = told["model"], told["text"]
    layers = geometry.layers
    heads = f"{layers[0].query.shape[0]} query and {layers[0].key.shape[0]} KV heads of {layers[0].query.shape[2]}"
    return [
        *_trained(geometry),
        ("Model", f"{model['name']} ({model['class']}, {model['parameters']:,} parameters)"),
        (
            "Layers measured",
            f"{', '.join(str(layer.index) for layer in layers)} of {geometry.opened.num_layers}, each with {heads}",
        ),
        ("Ties", ", ".join(dict.fromkeys(model["ties"]))),
        ("Text", f"{text['tokens']:,} tokens in rows of {text['context']:,}, the first {text['shown']} drawn"),
        ("Random draws", f"{geometry.question.draws} for each layer, seed {geometry.question.seed}"),
        ("Weights, SHA-256", model["weights_sha256"]),
        ("Text, SHA-256", text["sha256"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in told["versions"].items())),
    ]


def _trained(geometry: Geometry) -> list[tuple[str, str]]:
    """How the model was trained, where that is known."""
    run = geometry.opened.run
    if not run:
        return []
    training, scores = (
        run["training"],
        ", ".join(f"{name.replace('_', ' ')} {number(value, 3)}" for name, value in run["scores"].items()),
    )
    steps = (
        f"{training['steps']:,} steps of {training['batch_size']} examples of {run['task']['name']}, seed {run['seed']}"
    )
    return [("Trained", f"{steps}; held out: {scores}"), ("Data, SHA-256", run["data_hash"])]


def _script_safe(text: str) -> str:
    """JSON that can stand in a script element: no text of the model's ends it."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
