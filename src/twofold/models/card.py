"""The README.md beside saved weights: the tie, what it caches and costs beside (Q, K, V) with the same heads, and how to load the model.

A card that somebody has written or changed is theirs and stays. One that was written here ends with a digest of its own text, and may be written
again while the two agree.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from twofold.explain import REFERENCE, Cost, cost_of, facts_of, latent_note
from twofold.picture import bytes_text, change_text, count_text
from twofold.spec import ModelSpec

FILE = "README.md"
TOKENS = 32768
"""Tokens of the cache whose size is told, where learned positions reach so far."""

_MARK = "<!-- Written by Twofold, and written again with the model until it is edited: "
_KINDS = {
    "causal_lm": ("text-generation", "AutoModelForCausalLM", "language model"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification", "classifier of tokens"),
    "image_classification": ("image-classification", "AutoModelForImageClassification", "classifier of images"),
}
_LOAD = """```python
import twofold.models  # makes the architecture known to Transformers
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
```"""
# What Transformers puts in place of a card when it pushes a model that has none.
_GENERIC = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


def card_text(spec: ModelSpec, *, dtype: str, tags: Collection[str] = (), name: str = ".") -> str:
    """A whole card. ``dtype`` is that of the cache, a name of :data:`twofold.cost.DTYPE_BYTES`; ``name`` is what ``from_pretrained`` is given."""
    pipeline, auto, kind = _KINDS[spec.architecture]
    listed = "".join(f"- {tag}\n" for tag in dict.fromkeys(("twofold", *tags)))
    meanings = "".join(f"- `{facts.tie}`: {facts.meaning}\n" for facts in map(facts_of, dict.fromkeys(spec.tie.ties)))
    heads = f"{spec.num_attention_heads} query and {spec.num_key_value_heads} KV heads of {spec.head_dim}"
    meanings += f"\n{note}\n" if (note := latent_note(spec)) else ""
    body = (
        f"# A {kind} with {spec.mechanism}\n\n"
        f"Made with Twofold, attention that needs fewer than three projections. {spec.num_hidden_layers} layers of {spec.hidden_size}, "
        f"{heads}; queries, keys and values are tied:\n\n{meanings}\n"
        f"## Cost\n\n{_table(spec, dtype)}\n\n"
        f"## Loading\n\nWith the package `twofold` installed; no remote code is run.\n\n{_LOAD.format(auto=auto, name=name)}\n"
    )
    header = {"library_name": "transformers", "pipeline_tag": pipeline}
    front = "".join(f"{name}: {value}\n" for name, value in header.items())
    return f"---\n{front}tags:\n{listed}---\n\n{body}\n{_MARK}{_digest(header, body)} -->\n"


def _table(spec: ModelSpec, dtype: str) -> str:
    """Rows of Markdown: (Q, K, V) with the same heads, this model, and the change."""
    limit = spec.positions.max_positions
    tokens = min(TOKENS, limit) if limit and spec.architecture == "causal_lm" else TOKENS
    costs = [cost_of(model, tokens=tokens, dtype=dtype) for model in (spec.ordinary, spec)]
    rows = zip(_rows(costs[0], spec, dtype), _rows(costs[1], spec, dtype), strict=True)
    lines = [
        f"| {label} | {old_text} | {text} | {change_text(number, old_number)} |"
        for (label, old_text, old_number), (_, text, number) in rows
    ]
    return "\n".join([f"| | {REFERENCE}, the same heads | this model | change |", "|---|--:|--:|--:|", *lines])


def _rows(cost: Cost, spec: ModelSpec, dtype: str) -> list[tuple[str, str, float]]:
    rows: list[tuple[str, str, float]] = [
        ("parameters", count_text(cost.parameters), cost.parameters),
        ("of attention", count_text(cost.attention_parameters), cost.attention_parameters),
    ]
    if spec.causal:
        bytes_per_token = cost.cached_bytes_per_token
        rows += [
            (f"cached bytes per token, {dtype}", f"{bytes_per_token:,}", bytes_per_token),
            (f"cache of {cost.tokens:,} tokens", bytes_text(cost.cache_bytes), cost.cache_bytes),
            ("operations per new token", count_text(cost.decode_flops_per_token), cost.decode_flops_per_token),
        ]
    return rows


def somebodys_card(folder: Path) -> bytes | None:
    """A card that a person wrote or changed; None where there is no card, or one that was written here."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        return None if is_made(content.decode()) else content
    except (ValueError, YAMLError):  # a header that cannot be read, or no text at all
        return content


def is_made(text: str) -> bool:
    """Whether a card was written here, or by Transformers for want of one, and nobody has changed it (tags aside, which pushing adds)."""
    if _MARK not in text and _GENERIC not in text:
        return False
    card = ModelCard(text, ignore_metadata_errors=True)
    body, mark, digest = card.text.strip().rpartition(_MARK)
    if mark:
        return digest.removesuffix(" -->") == _digest(card.data.to_dict(), body)
    generic = ModelCard.from_template(ModelCardData(**card.data.to_dict()), model_description=_GENERIC)
    return set(card.data.to_dict()) <= {"library_name", "tags"} and card.text.strip() == generic.text.strip()


def tags_of(folder: Path) -> list[str]:
    """The tags in the header of the folder's card."""
    path = folder / FILE
    return list(ModelCard.load(path, ignore_metadata_errors=True).data.tags or []) if path.is_file() else []


def _digest(header: Mapping[str, Any], body: str) -> str:
    untagged = {name: value for name, value in header.items() if name != "tags"}
    return sha256(json.dumps([untagged, body.strip()], sort_keys=True).encode()).hexdigest()[:16]
