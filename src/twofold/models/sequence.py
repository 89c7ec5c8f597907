"""Which of a batch's tokens are text, which document they belong to, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.errors import TwofoldError

IGNORED = -100
"""The label of a token that is not scored, as in all of Transformers."""

OTHER_POSITIONS = (
    "position_ids are not those that a Twofold model counts itself, each document of a row from 0 and padding not at all: "
    "leave them out, or say what is packed by document_ids and what is padding by attention_mask."
)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The last T of S tokens, the first S - T of which are in the cache; that number is a tensor [] where only the device knows it.

    ``key_mask`` [B, S] is True where a token is text and False where it is padding (None: no padding); where a cache has its room
    pre-allocated it may be as wide as that, and what is to come counts as text. ``segments`` [B, T] numbers the documents that are packed into
    one row (None: one document).
    """

    num_tokens: int
    device: torch.device
    past_tokens: int | Tensor = 0
    key_mask: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        document_ids: Tensor | None = None,
        past_tokens: int | Tensor = 0,
        max_tokens: int = 0,
    ) -> Sequence:
        """Check and simplify what a caller gave for hidden states [B, T, C]; ``max_tokens`` is the room of the cache, 0 where it grows.

        Raises TwofoldError for shapes that do not fit.
        """
        batch, num_tokens = hidden_states.shape[:2]
        _check_shape("document_ids", document_ids, (batch, num_tokens))
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, max_tokens):
            total = int(past_tokens) + num_tokens
            _check_shape("attention_mask", attention_mask, (batch, total))
            if isinstance(past_tokens, Tensor):
                attention_mask = F.pad(attention_mask, (0, max_tokens - total), value=1)
        return cls(
            num_tokens=num_tokens,
            device=hidden_states.device,
            past_tokens=past_tokens,
            key_mask=_without_full_mask(attention_mask),
            segments=document_ids,
        )

    @property
    def total_tokens(self) -> int:
        """S. Looking at it may wait for the device."""
        return int(self.past_tokens) + self.num_tokens

    def _own(self, tokens: Tensor) -> Tensor:
        """The columns [..., T] of the T tokens, of those of all tokens."""
        if isinstance(self.past_tokens, Tensor):
            return tokens[..., self.past_tokens + torch.arange(self.num_tokens, device=self.device)]
        return tokens[..., self.past_tokens : self.past_tokens + self.num_tokens]

    def position_ids(self) -> Tensor:
        """The position of each of the T tokens, [T] or [B, T], counted from 0.

        Padding is not counted, so a text has the same positions wherever it is padded; each of several packed documents is counted from 0.
        """
        if self.key_mask is not None:
            text = self.key_mask.long()
        elif self.segments is not None:
            text = torch.ones_like(self.segments, dtype=torch.long)
        else:
            return self.past_tokens + torch.arange(self.num_tokens, device=self.device)
        counted = text.cumsum(dim=1)
        if self.segments is not None:
            starts = torch.ones_like(self.segments, dtype=torch.bool)
            starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
            counted = counted - (counted - text).masked_fill(~starts, 0).cummax(dim=1).values
        return self._own((counted - 1).clamp(min=0))

    def check_positions(self, position_ids: Tensor) -> None:
        """Raise TwofoldError for positions [B, T] or [1, T] of text that are not :meth:`position_ids`; nothing is looked at in a compiled graph."""
        if torch.compiler.is_compiling():
            return
        differs = position_ids != self.position_ids()
        if self.key_mask is not None:
            differs = differs & self._own(self.key_mask)
        if bool(differs.any()):
            raise TwofoldError(OTHER_POSITIONS)

    def next_token_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, T] of the tokens themselves -> labels of the tokens that follow, [B, T].

        Scored is the step from one token of text to the next of the same document, and nothing else: no padding, no step into or out of it,
        and no first token of a document that cannot see the one before it.
        """
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        if self.key_mask is not None:
            text = self._own(self.key_mask)
            shifted[:, :-1].masked_fill_(~(text[:, :-1] & text[:, 1:]), IGNORED)
        if self.segments is not None:
            shifted[:, :-1].masked_fill_(self.segments[:, :-1] != self.segments[:, 1:], IGNORED)
        return shifted

    def token_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, T] without those of padding."""
        return labels if self.key_mask is None else labels.masked_fill(~self._own(self.key_mask), IGNORED)


def documents_of(position_ids: Tensor) -> Tensor | None:
    """Numbers of the documents [B, T] packed into rows whose positions [B, T] begin again at 0 with each of them; None where no row has two.

    This is how Transformers says what is packed. Raises TwofoldError for positions that do not count every document from 0.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if torch.compiler.is_compiling():  # where nothing can be looked at
        return starts.cumsum(dim=1)
    if bool((starts & (position_ids != 0)).any()):
        raise TwofoldError(OTHER_POSITIONS)
    return starts.cumsum(dim=1) if bool(starts[:, 1:].any()) else None


def _check_shape(name: str, tensor: Tensor | None, wanted: tuple[int, int]) -> None:
    if tensor is not None and tuple(tensor.shape) != wanted:
        cached = " (those in the cache included)" if name == "attention_mask" else ""
        raise TwofoldError(
            f"{name} has the shape {tuple(tensor.shape)}, but must be (batch, tokens{cached}) = {wanted}."
        )


def _without_full_mask(attention_mask: Tensor | None) -> Tensor | None:
    """None where there is no padding: attention is then causal and nothing else, which every backend does fastest."""
    if attention_mask is None:
        return None
    text = attention_mask.bool()
    # Looking into the mask waits for the device once per forward pass; inside a compiled graph it cannot be done.
    if torch.compiler.is_compiling() or text.is_meta or not bool(text.all()):
        return text
    return None
