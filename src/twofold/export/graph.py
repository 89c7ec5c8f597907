"""The decoder as a function of tensors alone, (tokens, mask, cached tensors) -> (logits, cached tensors): what an exporter can trace.

Attention is given a cache of its own kind: it appends to what came in, and knows where tokens stand as tensors only, since a number would be traced
in. Rotations are rows of tables with a row for every position up to ``max_tokens``, one for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.models import TwofoldForCausalLM
from twofold.models.sequence import Sequence as Tokens

Made = TypeVar("Made")
Streams = tuple[Tensor, ...]


class PastStreams:
    """One layer's cache for one step. After :meth:`update`, ``present`` is what the next step must be given: with a window w, the last w tokens.

    ``tokens_seen`` [] is the position of the first new token; ``memo`` is shared by the layers.
    """

    def __init__(
        self, past: Streams, *, tokens_seen: Tensor, max_tokens: int, window_tokens: int, memo: dict[Any, Any]
    ) -> None:
        self.past = past
        self.present: Streams = ()
        self.tokens_seen = tokens_seen
        self.max_tokens = max_tokens
        self.window_tokens = window_tokens
        self.memo = memo

    def update(self, streams: Streams) -> Streams:
        """The streams [B, G, P, D] that came in and those of the T new tokens, as [B, G, P + T, D]."""
        grown = tuple(torch.cat(pair, dim=2) for pair in zip(self.past, streams, strict=True))
        self.present = grown
        if self.window_tokens:
            size = grown[0].shape[2]
            kept = torch.sym_min(size, self.window_tokens)
            self.present = tuple(stream.narrow(2, size - kept, kept) for stream in grown)
        return grown

    def key_positions(self, num_keys: int) -> Tensor:
        """[S]: the keys are the last S tokens, those that came in and the new ones."""
        first = self.tokens_seen - self.past[0].shape[2] if self.window_tokens else 0
        return self.remember(
            ("positions", self.window_tokens), lambda: first + torch.arange(num_keys, device=self.past[0].device)
        )

    def remember(self, name: object, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made once for all layers."""
        if name not in self.memo:
            self.memo[name] = make()
        made: Made = self.memo[name]
        return made


class DecoderStep(nn.Module):
    """``forward(input_ids [B, T], attention_mask [B, P + T], past) -> (logits [B, T, N], present)``, cached tensors in the order of the layers.

    ``past`` and ``present`` are a tuple of streams for each layer; a layer with a window is given the last tokens of the P, as many as its window,
    or all where there are fewer.
    """

    def __init__(self, model: TwofoldForCausalLM, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Streams]
    ) -> tuple[Tensor, tuple[Streams, ...]]:
        """One step, of any number of tokens."""
        model, num_tokens = self.model, input_ids.shape[1]
        seen = torch.full((), attention_mask.shape[1] - num_tokens, dtype=torch.long, device=input_ids.device)
        sequence = Tokens(
            num_tokens=num_tokens,
            device=input_ids.device,
            past_tokens=seen,
            key_mask=F.pad(attention_mask.bool(), (0, self.max_tokens - attention_mask.shape[1]), value=True),
        )
        hidden_states = model.embedding(model.embedding.embed_tokens(input_ids), sequence)
        memo: dict[Any, Any] = {}
        caches = []
        for index, (layer, streams) in enumerate(zip(model.trunk.layers, past, strict=True)):
            cache = PastStreams(
                streams,
                tokens_seen=seen,
                max_tokens=self.max_tokens,
                window_tokens=model.config.spec.attention(index).window_tokens,
                memo=memo,
            )
            hidden_states = layer(hidden_states, key_mask=sequence.key_mask, cache=cache)
            caches.append(cache)
        logits = model.lm_head(model.trunk.norm(hidden_states))
        return logits, tuple(cache.present for cache in caches)
