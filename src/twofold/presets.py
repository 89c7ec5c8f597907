"""Models by name: the paper's two language models, and two of our own that a laptop can train.

A preset is a :class:`~twofold.spec.ModelSpec` with the tie (Q, K, V); ``preset(name).with_changes(tie="(Q, K=V)")`` gives any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from twofold.errors import TwofoldError
from twofold.positions import LearnedPositions, RotaryPositions
from twofold.spec import GPT2_BLOCK, LLAMA_BLOCK, ModelSpec

_PREFIX = "paper-"


def _language_model(block: Mapping[str, object], **fields: object) -> ModelSpec:
    heads = {"num_key_value_heads": fields["num_attention_heads"]}
    return ModelSpec.from_dict({"tie": "(Q, K, V)", "architecture": "causal_lm", **heads, **block, **fields})


def _paper(**sizes: int) -> ModelSpec:
    """The GPT-2 shape that the paper trains: 64-wide heads, GPT-2's vocabulary padded to 50,304, 2,048 learned positions, residual dropout."""
    positions = LearnedPositions(length=2048)
    return _language_model(GPT2_BLOCK, vocab_size=50304, head_dim=64, positions=positions, dropout=0.1, **sizes)


def _ours(**sizes: int) -> ModelSpec:
    """A Llama-like model of bytes: RMSNorm, rotary positions turned on reading, gated MLP, no biases."""
    return _language_model(LLAMA_BLOCK, vocab_size=256, positions=RotaryPositions(), **sizes)


PRESETS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        "paper-300m": _paper(num_hidden_layers=20, hidden_size=1024, num_attention_heads=16, intermediate_size=4096),
        "paper-1.2b": _paper(num_hidden_layers=22, hidden_size=2048, num_attention_heads=32, intermediate_size=8192),
        "small": _ours(
            num_hidden_layers=8, hidden_size=512, num_attention_heads=8, head_dim=64, intermediate_size=1408
        ),
        "tiny": _ours(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, head_dim=32, intermediate_size=352),
    }
)
"""Name -> model. Source of the ``paper-`` ones: arXiv:2606.04032, the two sizes of its language models."""


def preset(name: str) -> ModelSpec:
    """The model called ``name``; the paper's may be called without ``paper-``. Raises TwofoldError for any other name.

    >>> preset("300m") == PRESETS["paper-300m"]
    True
    """
    for candidate in (name, f"{_PREFIX}{name}"):
        if candidate in PRESETS:
            return PRESETS[candidate]
    near = get_close_matches(name, [*PRESETS, *(known.removeprefix(_PREFIX) for known in PRESETS)], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise TwofoldError(f"There is no preset {name!r}{hint}: use one of {', '.join(PRESETS)}.")
