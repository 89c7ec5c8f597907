"""What a model reads, as hidden states: tokens or rows of floats, and learned positions where the model has them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.models.blocks import dropout
from twofold.models.sequence import Sequence
from twofold.spec import ModelSpec


class InputEmbedding(nn.Module):
    """x = tokens[input_ids] or features·W + b, plus positions[p] where positions are learned; [B, T] or [B, T, F] -> [B, T, C]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.hidden_size = spec.hidden_size
        # A module and not an Embedding: Transformers replaces it when it resizes the vocabulary.
        self.tokens: nn.Module | None = nn.Embedding(spec.vocab_size, spec.hidden_size) if spec.vocab_size else None
        self.features = nn.Linear(spec.feature_size, spec.hidden_size) if spec.feature_size else None
        length = spec.positions.max_positions
        self.positions = nn.Embedding(length, spec.hidden_size) if length else None
        self.dropout = dropout(spec.dropout)

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, C]. Raises TwofoldError for a shape or (on a CPU) a token that does not fit."""
        if self.tokens is None:
            raise TwofoldError("This model reads features and not tokens: call it with features=.")
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise TwofoldError(
                f"input_ids have the shape {tuple(input_ids.shape)}, but must be (batch, tokens), with one token at least."
            )
        try:
            return self.tokens(input_ids)
        except IndexError:
            last = cast("nn.Embedding", self.tokens).num_embeddings - 1
            raise TwofoldError(
                f"input_ids hold {int(input_ids.max())} (least {int(input_ids.min())}), but the vocabulary ends at {last}."
            ) from None

    def check_hidden_states(self, name: str, hidden_states: Tensor) -> Tensor:
        """[B, T, C], as it is. Raises TwofoldError for a shape that does not fit."""
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise TwofoldError(
                f"{name} have the shape {tuple(hidden_states.shape)}, but must be (batch, tokens, {self.hidden_size})."
            )
        return hidden_states

    def embed_features(self, features: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, C]. Raises TwofoldError for a shape that does not fit."""
        if self.features is None:
            raise TwofoldError("This model reads tokens and not features: call it with input_ids=.")
        if features.ndim != 3 or features.shape[-1] != self.features.in_features:
            raise TwofoldError(
                f"features have the shape {tuple(features.shape)}, but must be (batch, items, {self.features.in_features})."
            )
        return self.features(features)

    def forward(self, embedded: Tensor, sequence: Sequence) -> Tensor:
        """Add learned positions to [B, T, C], if the model has any. Raises TwofoldError where they do not reach."""
        if self.positions is not None:
            indices = sequence.position_ids()
            # The indices are looked into only if one may be out of range: on a GPU that waits for the device. Pre-allocated room never is.
            length = self.positions.num_embeddings
            if (
                not isinstance(sequence.past_tokens, Tensor)
                and sequence.total_tokens > length
                and int(indices.max()) >= length
            ):
                raise TwofoldError(
                    f"A sequence of {int(indices.max()) + 1} tokens is too long: this model has learned {length} positions."
                )
            embedded = embedded + self.positions(indices)
        return self.dropout(embedded)
