"""What is computed: the attention of one layer and the model around it, as plain values.

A spec is the function and nothing else: how it is fitted is a :class:`~twofold.training.spec.TrainingSpec`, where it
runs (backend, dtype, device) is decided by whoever calls it. Specs import no torch, compare with ``==``, and turn into
JSON and back without loss, so a run, a checkpoint and a report can all hold one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from twofold.errors import TwofoldError
from twofold.positions import NoPositions, PositionScheme, positions_from_dict, positions_to_dict
from twofold.tie import Tie, TiePattern

Architecture = Literal["causal_lm", "token_classification", "image_classification"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "relu", "silu"]

GPT2_BLOCK: Mapping[str, Any] = {"norm": "layernorm", "activation": "gelu", "gated_mlp": False, "use_bias": True}
LLAMA_BLOCK: Mapping[str, Any] = {"norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "use_bias": False}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention layer: tie × heads × positions × normalisation × mask.

    Logits are scaled by 1/√(query_dim + positions.key_extension_dim). ``window_tokens`` counts the keys a query may see,
    itself included; 0 means all of them. ``plus_channels`` is the number m of channels of the paper's 2-D positions,
    used where ``tie.plus`` is set. With ``latent_dim`` L > 0 keys and values are linear in a latent of L floats, which is what
    is cached (MLA, see :mod:`twofold.latent_attention`); 0: none.
    """

    tie: Tie
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    causal: bool
    positions: PositionScheme = field(default_factory=NoPositions)
    qk_norm: bool = False
    norm_eps: float = 1e-5
    use_bias: bool = False
    window_tokens: int = 0
    plus_channels: int = 10
    latent_dim: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        self.tie.check_heads(self.num_attention_heads, self.num_key_value_heads)
        if self.window_tokens < 0:
            raise TwofoldError(f"window_tokens is {self.window_tokens}, but it counts tokens: use 0 for no window.")
        if self.tie.plus and self.causal:
            raise TwofoldError(
                f"{self.tie} adds 2-D positions, which the paper defines for non-causal tasks only: drop the +."
            )
        if self.tie.plus and (self.plus_channels < 2 or self.plus_channels % 2):
            raise TwofoldError(
                f"plus_channels is {self.plus_channels}, but 2-D positions need an even number, half for each side."
            )
        self.positions.check(head_dim=self.head_dim, value_over_key=self.tie.value_over_key)
        if self.query_dim < self.head_dim and self.tie.needs_equal_heads:
            raise TwofoldError(f"{self.tie} ties Q with K or V, so their heads are of one length: drop key_dim.")
        self._check_latent()

    def _check_latent(self) -> None:
        heads = self.num_attention_heads
        if self.latent_dim < 0:
            raise TwofoldError(f"latent_dim is {self.latent_dim}, but it counts floats: use 0 for no latent.")
        if not self.latent_dim:
            return
        if self.tie.rank < 3 or self.tie.plus:
            raise TwofoldError(
                f"latent_dim makes K and V out of one latent, which is no tie between them: use (Q, K, V) with it, not {self.tie}."
            )
        if self.num_key_value_heads != heads:
            raise TwofoldError(
                f"latent_dim makes a key and a value for every query head: use num_key_value_heads {heads}, not {self.num_key_value_heads}."
            )
        if self.qk_norm:
            raise TwofoldError("latent_dim normalises the latent in place of keys and queries: leave qk_norm out.")
        if self.positions.turns_heads:
            raise TwofoldError(
                f"{self.positions.kind} positions turn keys, which are never made when decoding from a latent: use shared_rotary positions."
            )

    @property
    def scale(self) -> float:
        """1/√d of the logits, d being the length of a whole key."""
        return 1.0 / math.sqrt(self.query_dim + self.positions.key_extension_dim)

    @property
    def query_dim(self) -> int:
        """Dimensions in which a head's query is compared with the tied key: ``head_dim``, unless the positions say fewer."""
        return self.positions.compared_dims(self.head_dim)

    def columns_of(self, role: str) -> int:
        """Outputs of the free projection called ``role``, over all of its heads."""
        return self.heads_of(role) * (self.query_dim if role == "Q" else self.head_dim)

    def heads_of(self, role: str) -> int:
        """Heads of the free projection called ``role``: query heads for Q, KV heads for K and V."""
        return self.num_attention_heads if role == "Q" else self.num_key_value_heads


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A transformer whose every layer attends through a tie.

    ``tie`` names the tie of each layer (a :class:`TiePattern`, repeated over the layers; text is parsed),
    ``window_tokens`` its window in the same way (0: none). The inputs are tokens (``vocab_size``), rows of floats
    (``feature_size``), or images (``image_size``, ``patch_size``, ``num_channels``); a size of 0 means that the model has
    no such input. ``num_labels`` is used by the classification architectures.
    """

    tie: TiePattern
    architecture: Architecture
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    positions: PositionScheme = field(default_factory=NoPositions)
    vocab_size: int = 0
    feature_size: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_channels: int = 0
    num_labels: int = 0
    causal: bool = True
    norm: Norm = "layernorm"
    activation: Activation = "gelu"
    gated_mlp: bool = False
    use_bias: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-5
    window_tokens: tuple[int, ...] = (0,)
    plus_channels: int = 10
    latent_dim: int = 0
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.tie, (str, Tie)):
            object.__setattr__(self, "tie", TiePattern.parse(str(self.tie)))
        if isinstance(self.positions, Mapping):
            object.__setattr__(self, "positions", positions_from_dict(self.positions))
        _require_types(self)
        object.__setattr__(self, "window_tokens", tuple(self.window_tokens))
        _require_choice(self, architecture=Architecture, norm=Norm, activation=Activation)
        _require_positive(self, "hidden_size", "num_hidden_layers", "intermediate_size")
        if not 0 <= self.dropout < 1:
            raise TwofoldError(
                f"dropout is {self.dropout}, but it is a probability: use a number from 0 up to, not including, 1."
            )
        if not self.window_tokens or self.num_hidden_layers % len(self.window_tokens):
            raise TwofoldError(
                f"window_tokens names {len(self.window_tokens)} layers, which does not divide the model's {self.num_hidden_layers}."
            )
        self.tie.check_layers(self.num_hidden_layers)
        self._check_inputs()
        for layer_index in range(self.num_hidden_layers):
            self.attention(layer_index)

    def _check_inputs(self) -> None:
        if self.architecture == "image_classification":
            _require_positive(self, "image_size", "patch_size", "num_channels", "num_labels")
            if self.image_size % self.patch_size:
                raise TwofoldError(
                    f"Patches of {self.patch_size} pixels do not tile an image of {self.image_size} pixels."
                )
        elif self.architecture == "token_classification":
            _require_positive(self, "num_labels")
            if (self.vocab_size > 0) == (self.feature_size > 0):
                raise TwofoldError(
                    "A token classifier reads either tokens or features: set exactly one of vocab_size and feature_size."
                )
        else:
            _require_positive(self, "vocab_size")
            if not self.causal:
                raise TwofoldError("A causal_lm predicts the next token, so causal must be true.")

    def attention(self, layer_index: int) -> AttentionSpec:
        """The attention of one layer."""
        return AttentionSpec(
            tie=self.tie.tie(layer_index),
            window_tokens=self.window_tokens[layer_index % len(self.window_tokens)],
            **{name: getattr(self, name) for name in _SHARED_WITH_ATTENTION},
        )

    @property
    def mechanism(self) -> str:
        """The ties in text, and the latent where there is one."""
        return f"{self.tie}, latent of {self.latent_dim}" if self.latent_dim else str(self.tie)

    @property
    def ordinary(self) -> Self:
        """(Q, K, V) with the same heads and, as far as they go without a tie, the same positions: what the costs of a tie stand beside."""
        return self.with_changes(tie="(Q, K, V)", positions=self.positions.without_tie(), latent_dim=0)

    def with_changes(self, **changes: Any) -> Self:
        """The same model with some fields replaced; everything is checked again."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise TwofoldError(
                f"A model has no field {sorted(unknown)[0]!r}; its fields are {', '.join(f.name for f in fields(self))}."
            )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` gives the same spec back."""
        values = asdict(replace(self)) | {
            "tie": str(self.tie),
            "positions": positions_to_dict(self.positions),
            "window_tokens": list(self.window_tokens),
        }
        if not self.latent_dim:  # it came later, and runs without it keep their fingerprints
            del values["latent_dim"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A spec from :meth:`to_dict`'s fields. Raises TwofoldError for a field that is unknown or missing."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise TwofoldError(f"A model has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise TwofoldError(f"This is not a whole model: {error}.") from None


_SHARED_WITH_ATTENTION = tuple(
    f.name for f in fields(AttentionSpec) if f.name in {g.name for g in fields(ModelSpec)} - {"tie", "window_tokens"}
)


def _require_types(spec: ModelSpec) -> None:
    """What a file may hold is anything at all; a wrong kind of value would be an error of Python's, far from here."""
    kinds: dict[str, tuple[Any, str]] = {
        "int": (int, "a whole number"),
        "float": ((int, float), "a number"),
        "bool": (bool, "true or false"),
    }
    for f in fields(spec):
        value = getattr(spec, f.name)
        kind, words = kinds.get(str(f.type), (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and f.type in ("int", "float")):
            raise TwofoldError(f"{f.name} is {value!r}, but it must be {words}.")
    if not isinstance(spec.tie, TiePattern):
        raise TwofoldError(f"tie is {spec.tie!r}, but it must be a tie or a pattern of ties, such as '(Q, K=V)'.")
    if not isinstance(spec.positions, PositionScheme):
        raise TwofoldError(
            f"positions are {spec.positions!r}, but they must be a scheme, such as {{'kind': 'rotary'}}."
        )
    windows: object = spec.window_tokens
    if not isinstance(windows, (list, tuple)) or not all(type(window) is int for window in windows):
        raise TwofoldError(f"window_tokens is {windows!r}, but it must be a list of whole numbers, one for each layer.")


def _require_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TwofoldError(f"{name} is {value!r}, but it must be a whole number of at least 1.")


def _require_choice(spec: object, **choices: Any) -> None:
    for name, literal in choices.items():
        value, allowed = getattr(spec, name), get_args(literal)
        if value not in allowed:
            raise TwofoldError(f"{name} is {value!r}, but it must be one of {', '.join(allowed)}.")
