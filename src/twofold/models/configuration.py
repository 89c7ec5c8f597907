"""The configuration that Transformers stores beside the weights: a :class:`~twofold.spec.ModelSpec`, written flat."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from twofold.cache import LAYER_TYPE
from twofold.errors import TwofoldError
from twofold.positions import positions_to_dict
from twofold.positions.scheme import PositionScheme
from twofold.spec import ModelSpec


class TwofoldConfig(PreTrainedConfig):
    """``TwofoldConfig(tie="(Q, K=V)", vocab_size=50304, hidden_size=1024, ...)``: the fields of :class:`~twofold.spec.ModelSpec`.

    What is left out gets what is usual, and is stored explicitly: as many KV heads as query heads, ``head_dim`` C / H,
    ``intermediate_size`` 4 C, and the positions of the architecture: rotary for a causal_lm, one learned row per patch and one for the class
    token for an image_classification, none for a token_classification (a set). ``vocab_size`` is 256 (bytes) where the model reads tokens.

    Raises TwofoldError for sizes that do not fit one another, for a tie that cannot be read, and for a misspelt field.

    >>> TwofoldConfig(tie="(Q, K=V)", hidden_size=64, num_attention_heads=4).spec.head_dim
    16
    """

    model_type: ClassVar[str] = "twofold"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    tie: Any = "(Q, K, V)"
    architecture: str = "causal_lm"
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    positions: Any = None
    vocab_size: int | None = None
    feature_size: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_channels: int = 0
    causal: bool | None = None
    norm: str = "layernorm"
    activation: str = "gelu"
    gated_mlp: bool = False
    use_bias: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-5
    window_tokens: Any = (0,)
    plus_channels: int = 10
    latent_dim: int = 0
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: Any = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs)
        self._fill_in()
        if self.architecture == "causal_lm" and self.id2label is None:
            # Transformers takes two labels for granted; a language model has none.
            kwargs.setdefault("num_labels", 0)
        super().__post_init__(**kwargs)
        spec = self.spec
        self.tie = str(spec.tie)
        self.positions = positions_to_dict(spec.positions)
        self.window_tokens = list(spec.window_tokens)

    def _fill_in(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # Sizes that are no numbers are left to the spec, which says so.
        if self.head_dim is None and isinstance(self.hidden_size, int) and isinstance(self.num_attention_heads, int):
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise TwofoldError(
                    f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads: say head_dim as well."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None and isinstance(self.hidden_size, int):
            self.intermediate_size = 4 * self.hidden_size
        is_image = self.architecture == "image_classification"
        if self.vocab_size is None:
            self.vocab_size = 0 if is_image or self.feature_size else 256
        if self.causal is None:
            self.causal = self.architecture == "causal_lm"
        if self.positions is None:
            self.positions = self._usual_positions()
        if isinstance(self.positions, PositionScheme):
            self.positions = positions_to_dict(self.positions)
        if isinstance(self.window_tokens, int):
            self.window_tokens = [self.window_tokens]

    def _usual_positions(self) -> dict[str, Any]:
        if self.architecture == "causal_lm":
            return {"kind": "rotary"}
        sizes_are_numbers = isinstance(self.image_size, int) and isinstance(self.patch_size, int)
        if self.architecture == "image_classification" and sizes_are_numbers and self.patch_size > 0:
            return {"kind": "learned", "length": (self.image_size // self.patch_size) ** 2 + 1}
        return {"kind": "none"}

    @property
    def spec(self) -> ModelSpec:
        """The model as a value. Raises TwofoldError if the fields do not fit one another."""
        return ModelSpec.from_dict({name: getattr(self, name) for name in _SPEC_FIELDS})

    @classmethod
    def from_spec(cls, spec: ModelSpec, **options: Any) -> TwofoldConfig:
        """The configuration of a model; ``options`` are Transformers' own (``eos_token_id``, ``use_cache`` ...)."""
        return cls(**spec.to_dict(), **options)

    @property
    def max_position_embeddings(self) -> int | None:
        """The most tokens of a text where positions are learned, under the name by which other tools ask; None: as many as there are."""
        return self.spec.positions.max_positions or None

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache of each layer; never one of Transformers' own, which hold a key and a value apart."""
        return [LAYER_TYPE] * self.num_hidden_layers

    def validate(self) -> None:
        """Raise TwofoldError if the fields do not fit one another."""
        # In place of Transformers' own check, which knows no cache layers but its own.
        _ = self.spec


_SPEC_FIELDS = tuple(ModelSpec.__dataclass_fields__)


def _refuse_misspelt(options: Mapping[str, Any]) -> None:
    """Transformers stores any keyword it does not know: a misspelt field would silently be no field."""
    if "max_position_embeddings" in options:
        raise TwofoldError(
            "max_position_embeddings follows from the positions: say positions={'kind': 'learned', 'length': ...}, or leave it out."
        )
    fields = [*_SPEC_FIELDS, "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"]
    for name in options:
        if name not in fields and (near := get_close_matches(name, fields, n=1, cutoff=0.85)):
            raise TwofoldError(f"A model has no field {name!r}: did you mean {near[0]!r}?")
