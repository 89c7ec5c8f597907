"""Which cache ``generate`` makes, from the options by which Transformers names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twofold.cache_spec import CacheSpec
from twofold.errors import TwofoldError

IMPLEMENTATIONS = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
QUANTIZED_OPTIONS = ("backend", "nbits", "axis", "q_group_size", "residual_length")


def cache_spec_of(implementation: str | None, options: Any, max_tokens: int) -> CacheSpec:
    """``generate``'s ``cache_implementation`` and ``cache_config`` as a CacheSpec; ``max_tokens`` is what it may come to.

    ``cache_config`` is for "quantized" and has Transformers' own names: ``nbits`` (8 or 4, the default), ``axis`` ("token", the default,
    "channel", or "head"), ``q_group_size`` (32), ``residual_length`` (128, the tokens that stay as computed). With ``axis`` "head", codes that kernels
    read, it is for every implementation, ``nbits`` is 8 and ``residual_length`` 0. Raises TwofoldError for what is not there.
    """
    implementation = implementation or "dynamic"
    if implementation not in IMPLEMENTATIONS:
        raise TwofoldError(
            f"There is no tied cache {implementation!r}: as cache_implementation use one of {', '.join(IMPLEMENTATIONS)}."
        )
    options = dict(options) if isinstance(options, Mapping) else {}
    held = CacheSpec(
        max_tokens=max_tokens if implementation.endswith("static") else 0,
        offload=implementation.startswith("offloaded"),
    )
    is_quantized = implementation == "quantized" or options.get("axis") == "head"
    return replace(held, **_quantized(options)) if is_quantized else held


def _quantized(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a CacheSpec says the same."""
    for name in options:
        if name not in QUANTIZED_OPTIONS:
            raise TwofoldError(
                f"A quantized cache has no option {name!r}: its options are {', '.join(QUANTIZED_OPTIONS)}."
            )
    if options.get("backend", "twofold") != "twofold":
        raise TwofoldError(
            f"The quantizer {options['backend']!r} holds keys and values apart: leave backend out, a tied cache quantizes by itself."
        )
    is_read_as_codes = options.get("axis") == "head"
    return {
        "bits": options.get("nbits", 8 if is_read_as_codes else 4),
        "axis": options.get("axis", "token"),
        "group_size": options.get("q_group_size", 32),
        "tail_tokens": options.get("residual_length", 0 if is_read_as_codes else 128),
    }
