"""What follows from sizes alone: parameters and cache of a preset, as the package counts them (and its tests check against real models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.claims.claim import CountedEvidence
from twofold.cost import cache_bytes, parameters
from twofold.presets import preset

UNITS = {"parameters": "parameters", "cache bytes": "bytes in bf16", "cached tensors": "cached tensors"}


def counted(evidence: CountedEvidence) -> tuple[str, float, str]:
    """What was counted in words, the number, and its unit."""
    own = _count(evidence, evidence.model)
    what = f"{evidence.preset}, {_named(evidence.model)}: {evidence.quantity}"
    if evidence.quantity == "cache bytes":
        what += f" of {evidence.tokens:,} tokens"
    if evidence.against is None:
        return what, own, evidence.unit or UNITS[evidence.quantity]
    return f"{what}, part of those of {_named(evidence.against)}", own / _count(evidence, evidence.against), "ratio"


def _count(evidence: CountedEvidence, changes: Mapping[str, Any]) -> float:
    model = preset(evidence.preset).with_changes(**changes)
    if evidence.quantity == "parameters":
        return parameters(model)
    if evidence.quantity == "cached tensors":
        return model.tie.tie(0).cached_tensors
    return cache_bytes(model, tokens=evidence.tokens, dtype="bf16")


def _named(changes: Mapping[str, Any]) -> str:
    words = [str(changes.get("tie", "(Q, K, V)"))]
    if "num_key_value_heads" in changes:
        words.append(f"{changes['num_key_value_heads']} KV heads")
    return ", ".join(words)
