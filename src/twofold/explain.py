"""What a tie means, as data: its equations, weights, cached tensors, symmetry and heads in words, and its cost in a model.

Nothing here prints: :mod:`twofold.picture` draws it in a terminal, ``dataclasses.asdict`` turns it into JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import groupby
from typing import Any

from twofold.cost import (
    attention_parameters,
    cache_bytes,
    cached_bytes_per_token,
    cached_floats_per_token,
    decode_flops_per_token,
    parameters,
    training_flops_per_token,
)
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.tie import ROLES, Tie, TiePattern

REFERENCE = "(Q, K, V)"

# A 2026 paper (arXiv:2606.04032) prints these names; its minus sign is a mangled "≠" or a dash.
PUBLISHED_NAMES = {"Q-K=V": "(Q, K=V)", "Q=K-V": "(Q=K, V)"}


@dataclass(frozen=True, kw_only=True)
class TieFacts:
    """Everything that follows from one tie. ``matrix`` has the rows Q, K, V over the columns ``free_projections``."""

    tie: str
    meaning: str
    equations: tuple[str, ...]
    matrix: tuple[tuple[str, ...], ...]
    free_projections: tuple[str, ...]
    roles: tuple[str, ...]
    output: str
    weights: str
    cached_tensors: int
    cached_roles: tuple[str, ...]
    cache: str
    is_symmetric: bool
    logits: str
    needs_equal_heads: bool
    heads: str
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model with the tie costs. Caches are those of one sequence of ``tokens`` tokens in ``dtype``."""

    tokens: int
    dtype: str
    parameters: int
    attention_parameters: int
    cached_floats_per_token: int
    cached_bytes_per_token: int
    cache_bytes: int
    training_flops_per_token: float
    decode_flops_per_token: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One text as it was written, the ties it names layer by layer, and their cost in a model; ``mechanism`` also names the model's latent.

    ``cost`` is None where the model cannot have the ties; ``refusal`` then says why.
    """

    written: str
    pattern: str
    mechanism: str
    layers: tuple[tuple[int, str], ...]
    ties: tuple[TieFacts, ...]
    notes: tuple[str, ...]
    cost: Cost | None
    refusal: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def explain(text: str, model: ModelSpec, *, tokens: int = 32768, dtype: str = "bf16") -> Explanation:
    """Explain a tie, or a pattern of ties, within a model whose own tie is set aside.

    Raises TieError where the text cannot be read, and TwofoldError for an impossible number of tokens or dtype; a model that cannot have
    the tie is told in ``refusal``.

    >>> from twofold.presets import PRESETS
    >>> explanation = explain("(Q, K=V)", PRESETS["paper-300m"])
    >>> explanation.ties[0].free_projections, explanation.cost.cached_bytes_per_token
    (('Q', 'K'), 40960)
    """
    pattern = TiePattern.parse(text)
    notes = [note for note in (_published_note(text), _plus_note(pattern, model)) if note]
    cost, refusal, mechanism = None, "", str(pattern)
    cached_bytes_per_token(model, dtype)  # an unknown dtype is a mistake of the whole question, not of this tie
    try:
        placed = model.with_changes(tie=_without_plus(pattern) if model.causal else pattern)
    except TwofoldError as error:
        refusal = str(error)
    else:
        cost = cost_of(placed, tokens=tokens, dtype=dtype)
        if model.latent_dim:
            mechanism, notes = placed.mechanism, [*notes, latent_note(model)]
    return Explanation(
        written=text,
        pattern=str(pattern),
        mechanism=mechanism,
        layers=tuple((len(list(run)), str(tie)) for tie, run in groupby(pattern.ties)),
        ties=tuple(facts_of(tie, latent_dim=model.latent_dim) for tie in dict.fromkeys(pattern.ties)),
        notes=tuple(notes),
        cost=cost,
        refusal=refusal,
    )


def cost_of(model: ModelSpec, *, tokens: int, dtype: str) -> Cost:
    """The model's cost; operations per token are those at ``tokens`` tokens."""
    return Cost(
        tokens=tokens,
        dtype=dtype,
        parameters=parameters(model),
        attention_parameters=sum(attention_parameters(model.attention(i)) for i in range(model.num_hidden_layers)),
        cached_floats_per_token=cached_floats_per_token(model),
        cached_bytes_per_token=cached_bytes_per_token(model, dtype),
        cache_bytes=cache_bytes(model, tokens, dtype),
        training_flops_per_token=training_flops_per_token(model, tokens),
        decode_flops_per_token=decode_flops_per_token(model, tokens) if model.causal else 0.0,
    )


def facts_of(tie: Tie, *, latent_dim: int = 0) -> TieFacts:
    """What follows from one tie, in data and in words; with a latent (which a tied layer cannot have) what follows from that too."""
    facts = _facts_of(tie)
    if not latent_dim or tie.equations:
        return facts
    return replace(
        facts,
        meaning=f"The query has weights of its own, keys and values of all heads are made of one latent of {latent_dim} floats.",
        weights="W_Q, the latent's, and out of the latent W_K and W_V (and W_O)",
        cached_tensors=1,
        cached_roles=(),
        cache=f"1 latent of {latent_dim} floats per token for all heads, read as key and as value",
        heads="as many KV heads as query heads, which costs no cache",
    )


def latent_note(model: ModelSpec) -> str:
    """What a model with a latent is beside its tie; empty where it has none."""
    if not model.latent_dim:
        return ""
    key = "and the shared rotary key are" if model.positions.key_extension_dim else "is"
    return (
        f"K and V are linear in one latent of {model.latent_dim} floats (MLA), which {key} cached in their place: "
        "no tie between roles, so it is a field of the model, latent_dim."
    )


def _facts_of(tie: Tie) -> TieFacts:
    expressions = tuple(expression(tie, role) for role in ROLES)
    roles = tuple(role if role == text else f"{role} = {text}" for role, text in zip(ROLES, expressions, strict=True))
    names = tuple(f"W_{name}" for name in tie.free_projections)
    return TieFacts(
        tie=str(tie),
        meaning=_meaning(tie, roles),
        equations=tuple(text for text in roles if "=" in text),
        matrix=tuple(tuple(str(number) for number in row) for row in tie.matrix),
        free_projections=tie.free_projections,
        roles=roles,
        output=_output(expressions),
        weights=f"{tie.rank} of 3 projections: {_listing(names)} (and W_O)",
        cached_tensors=tie.cached_tensors,
        cached_roles=("K",) if tie.cached_tensors == 1 else ("K", "V"),
        cache=_cache(tie),
        is_symmetric=tie.is_symmetric,
        logits=_logits(tie),
        needs_equal_heads=tie.needs_equal_heads,
        heads=_heads(tie),
        remarks=_remarks(tie),
    )


def expression(tie: Tie, role: str) -> str:
    """The role as a sum of free projections, each named after the role it is: ``Q - 1/2 K``."""
    text = ""
    for name, number in zip(tie.free_projections, tie.row(role), strict=True):
        if number:
            sign = (" - " if number < 0 else " + ") if text else ("-" if number < 0 else "")
            text += sign + _times(abs(number), name)
    return text


def _times(number: Fraction, name: str) -> str:
    """``Q``, ``2Q``, ``1/2 Q``."""
    if number == 1:
        return name
    return f"{number}{name}" if number.denominator == 1 else f"{number} {name}"


def _output(expressions: tuple[str, ...]) -> str:
    q, k, v = (text if len(text) == 1 else f"({text})" for text in expressions)
    return f"softmax({q} {k}ᵀ / √D) {v}"


def _meaning(tie: Tie, roles: tuple[str, ...]) -> str:
    derived = [text for text in roles if "=" in text]
    if not derived:
        sentence = "Query, key and value each have weights of their own: ordinary attention."
    else:
        free = _listing(tie.free_projections)
        have = "has weights of its own" if tie.rank == 1 else "have weights of their own"
        sentence = f"{free} {have}; {_listing(tuple(derived))}."
    return sentence + (" 2-D positions are added to the logits." if tie.plus else "")


def _cache(tie: Tie) -> str:
    if tie.value_over_key is None:
        return "2 tensors per token and KV head: K and V"
    read = "key and value" if tie.value_over_key == 1 else f"key, and {_times(tie.value_over_key, 'K')} as value"
    return f"1 tensor per token and KV head: K, read as {read}"


def _logits(tie: Tie) -> str:
    if tie.query_over_key is None:
        return "not symmetric: token i may look at j without j looking at i"
    return "symmetric before mask and positions: token i scores j as j scores i"


def _heads(tie: Tie) -> str:
    if tie.needs_equal_heads:
        return "as many KV heads as query heads, since Q takes part in the tie (no GQA, no MQA)"
    return "any number of KV heads that divides the query heads (GQA, MQA)"


def _remarks(tie: Tie) -> tuple[str, ...]:
    remarks = []
    if tie.value_over_key not in (None, 1):
        remarks.append("W_O takes the factor between V and K: this is the same class of functions as V = K.")
    if tie.rank < 3 and tie.cached_tensors == 2:
        remarks.append("It saves weights and no cache: only V = K, up to a factor, halves the cache.")
    return tuple(remarks)


def _published_note(text: str) -> str:
    meant = PUBLISHED_NAMES.get("".join(text.split()).replace("−", "-"))
    if not meant:
        return ""
    read = TiePattern.parse(text)
    return (
        f"Minus is minus: this is the equation {read}. A 2026 paper (arXiv:2606.04032) writes {meant} that way; if that is meant, "
        f'write "{meant}".'
    )


def _plus_note(pattern: TiePattern, model: ModelSpec) -> str:
    if model.causal and any(tie.plus for tie in pattern.ties):
        return "The 2-D positions of + are for models that are not causal; the cost below leaves them out."
    return ""


def _without_plus(pattern: TiePattern) -> TiePattern:
    return TiePattern(tuple(tie.without_plus for tie in pattern.ties))


def _listing(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
