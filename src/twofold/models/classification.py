"""A label for every element of a list, or of a set: of tokens, or of rows of floats."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput

from twofold.errors import TwofoldError
from twofold.models.blocks import Trunk
from twofold.models.configuration import TwofoldConfig
from twofold.models.embedding import InputEmbedding
from twofold.models.loss import mean_cross_entropy
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.sequence import Sequence


class TwofoldForTokenClassification(TwofoldPreTrainedModel):
    """An encoder, or with ``causal`` a decoder, that gives ``num_labels`` logits for each element; without positions it reads a set."""

    architecture = "token_classification"

    def __init__(self, config: TwofoldConfig, *, backend: str = "auto", initial_seed: int | None = None) -> None:
        super().__init__(config, backend=backend, initial_seed=initial_seed)
        spec = config.spec
        self.embedding = InputEmbedding(spec)
        self.trunk = Trunk(spec, self.backend)
        self.classifier = nn.Linear(spec.hidden_size, spec.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """``input_ids`` [B, T] or ``features`` [B, T, F] -> logits [B, T, num_labels], and with ``labels`` [B, T] the loss.

        ``attention_mask`` [B, T] is 0 where an element is padding: no other element sees it, and it is not scored; nor are labels of -100.
        Raises TwofoldError for shapes and tokens that do not fit.
        """
        record = self._record(options, known=("num_items_in_batch",))
        embedded = self._embedded(input_ids, features)
        sequence = Sequence.of(embedded, attention_mask=attention_mask)
        hidden_states = self.trunk(self.embedding(embedded, sequence), sequence, record=record)
        logits = self.classifier(hidden_states)
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits, sequence.token_labels(labels), options.get("num_items_in_batch"))
        return self._output(TokenClassifierOutput, options, loss=loss, logits=logits, record=record)

    def _embedded(self, input_ids: Tensor | None, features: Tensor | None) -> Tensor:
        if input_ids is not None and features is None:
            return self.embedding.embed_tokens(input_ids)
        if features is not None and input_ids is None:
            return self.embedding.embed_features(features)
        raise TwofoldError("Give the model exactly one of input_ids and features.")

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens, or the map of features."""
        found = self.embedding.features if self.embedding.tokens is None else self.embedding.tokens
        assert found is not None
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of tokens."""
        self.embedding.tokens = value
