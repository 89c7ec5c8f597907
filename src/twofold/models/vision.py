"""The vision transformer: patches in reading order behind a class token, whose last state is the image's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from twofold.errors import TwofoldError
from twofold.models.blocks import Trunk
from twofold.models.configuration import TwofoldConfig
from twofold.models.embedding import InputEmbedding
from twofold.models.loss import mean_cross_entropy
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.sequence import Sequence
from twofold.spec import ModelSpec


class PatchEmbedding(nn.Module):
    """Pixels [B, channels, size, size] -> [class token; W·patch_1 + b; W·patch_2 + b; ...], [B, 1 + (size / patch)², C]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.shape = (spec.num_channels, spec.image_size, spec.image_size)
        self.patches = nn.Conv2d(spec.num_channels, spec.hidden_size, spec.patch_size, stride=spec.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, spec.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raises TwofoldError for images of another shape."""
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != self.shape:
            raise TwofoldError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}, but must be (batch, {', '.join(map(str, self.shape))})."
            )
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat((self.class_token.expand(len(patches), -1, -1), patches), dim=1)


class TwofoldForImageClassification(TwofoldPreTrainedModel):
    """One of ``num_labels`` for each image."""

    architecture = "image_classification"
    main_input_name = "pixel_values"

    def __init__(self, config: TwofoldConfig, *, backend: str = "auto", initial_seed: int | None = None) -> None:
        super().__init__(config, backend=backend, initial_seed=initial_seed)
        spec = config.spec
        num_tokens = (spec.image_size // spec.patch_size) ** 2 + 1
        if 0 < spec.positions.max_positions < num_tokens:
            raise TwofoldError(
                f"An image is {num_tokens} tokens (its patches and the class token), but there are {spec.positions.max_positions} learned positions."
            )
        if spec.causal:
            raise TwofoldError("An image's class token stands first and must see all patches: set causal=False.")
        self.patches = PatchEmbedding(spec)
        self.embedding = InputEmbedding(spec)
        self.trunk = Trunk(spec, self.backend)
        self.classifier = nn.Linear(spec.hidden_size, spec.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        """``pixel_values`` [B, channels, size, size] -> logits [B, num_labels], and with ``labels`` [B] the loss.

        Raises TwofoldError for shapes that do not fit.
        """
        record = self._record(options, known=("num_items_in_batch",))
        embedded = self.patches(pixel_values)
        sequence = Sequence.of(embedded, attention_mask=None)
        hidden_states = self.trunk(self.embedding(embedded, sequence), sequence, record=record)
        logits = self.classifier(hidden_states[:, 0])
        loss = None if labels is None else mean_cross_entropy(logits, labels, options.get("num_items_in_batch"))
        return self._output(ImageClassifierOutput, options, loss=loss, logits=logits, record=record)

    def get_input_embeddings(self) -> nn.Module:
        """The map of patches."""
        return self.patches.patches
