"""A layer with all of its room taken at once: no tensor moves or changes its shape, so a compiled step serves every token.

Without a window, slot p holds the token at position p. With a window of w the w slots are a ring: the token at position p lies in slot p mod w.
Which slots hold a key, and of which position, is worked out in tensors from the number of tokens seen, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.cache.layer import StreamLayer, check_like, named, numbered
from twofold.errors import TwofoldError
from twofold.rotations import Positions, Span


class StaticTiedLayer(StreamLayer):
    """Room for ``max_tokens`` tokens, of which a window needs no more than w; ``streams`` are the buffers [B, G, N, D], filled or not."""

    _layer_type = "twofold_tied_static"
    is_compileable = True

    def __init__(self, max_tokens: int, window_tokens: int = 0, num_coded: int = 0, **options: Any) -> None:
        super().__init__(window_tokens, num_coded, **options)
        self.max_tokens = max_tokens
        self.num_slots = min(max_tokens, window_tokens) if window_tokens else max_tokens
        self.streams: tuple[Tensor, ...] = ()
        self.tokens_seen: Tensor = torch.zeros((), dtype=torch.long)
        self.tokens_written = self.tokens_seen.clone()  # more than were seen where some were taken back
        self.memo: dict[str, Any] = {}

    @property
    def is_ring(self) -> bool:
        """Whether slots are used again."""
        return self.num_slots < self.max_tokens

    @property
    def _may_look(self) -> bool:
        """Whether the number of tokens may be looked at: on a GPU that waits for the device, in a compiled step it would be compiled in."""
        return self.tokens_seen.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def next_position(self) -> int | Tensor:
        """See :attr:`StreamLayer.next_position`."""
        return int(self.tokens_seen) if self._may_look else self.tokens_seen

    def _take_room(self, streams: Sequence[Tensor]) -> None:
        self.device = streams[0].device
        # Copied first: a cache that is used twice must not write into what a caller may still hold.
        self.tokens_seen = self.tokens_seen.to(self.device)
        self.tokens_written = self.tokens_written.to(self.device)
        self.streams = tuple(
            stream.new_zeros((*stream.shape[:-2], self.num_slots, stream.shape[-1])) for stream in streams
        )
        if not torch.compiler.is_compiling():
            for tensor in (*self.streams, self.tokens_seen, self.tokens_written):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def check_room(self, num_tokens: int) -> None:
        """Raise TwofoldError if ``num_tokens`` more cannot be held."""
        seen = int(self.tokens_seen)
        if seen + num_tokens > self.max_tokens:
            raise TwofoldError(
                f"The cache has room for {self.max_tokens} tokens, holds {seen} and was given {num_tokens} more: make one with more room."
            )

    def append(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :meth:`StreamLayer.append`. A ring gives what it held and the new tokens, or (for one new token) itself."""
        if not self.streams:
            self._take_room(streams)
        else:
            check_like(self.streams, streams)
        num_tokens = streams[0].shape[-2]
        if self._may_look:
            self.check_room(num_tokens)
        if self.is_ring and num_tokens > 1:
            read = tuple(torch.cat(pair, dim=-2) for pair in zip(self.streams, streams, strict=True))
        else:
            read = self.streams
        kept = min(num_tokens, self.num_slots)
        slots = self.tokens_seen + torch.arange(num_tokens - kept, num_tokens, device=self.device)
        slots = slots % self.num_slots if self.is_ring else slots
        for buffer, stream in zip(self.streams, streams, strict=True):
            buffer.index_copy_(2, slots, stream[..., num_tokens - kept :, :])
        self.tokens_seen.add_(num_tokens)
        self.tokens_written.copy_(torch.maximum(self.tokens_written, self.tokens_seen))
        if not self.is_ring and self._may_look:
            # What is not filled need not be read.
            return tuple(buffer[..., : int(self.tokens_seen), :] for buffer in read)
        return read

    def key_positions(self, num_keys: int) -> Positions:
        """Slot p's is p; a ring's slots have each the last position that fell to them, followed by the new tokens' own."""
        if not self.is_ring:
            return Span(0, num_keys)
        if num_keys == self.num_slots:
            return self._ring_positions(self.tokens_seen)
        first_new = self.tokens_seen - (num_keys - self.num_slots)
        new = first_new + torch.arange(num_keys - self.num_slots, device=self.device)
        return torch.cat((self._ring_positions(first_new), new))

    def _ring_positions(self, end: Tensor) -> Tensor:
        """The last position before ``end`` that is slot s modulo the number of slots; negative while a slot is empty."""
        slots = torch.arange(self.num_slots, device=self.device)
        return end - 1 - (end - 1 - slots) % self.num_slots

    @property
    def tokens_kept(self) -> int:
        """How many of the last tokens are still held: a ring's slots of tokens that were taken back held older ones before."""
        seen = int(self.tokens_seen)
        return min(seen, self.num_slots - (int(self.tokens_written) - seen)) if self.is_ring else seen

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back any number of tokens."""
        return not self.is_ring

    def get_max_length(self) -> int:
        """The room."""
        return self.max_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that ``query_length`` new tokens will be given, filled or not; the positions of a ring are not in order."""
        return (self.num_slots + query_length if self.is_ring and query_length > 1 else self.num_slots), 0

    def crop_to(self, tokens: int) -> None:
        """See :meth:`StreamLayer.crop_to`: what lies behind the last token is not read, and overwritten by the next."""
        self.tokens_seen.fill_(tokens)

    def reset(self) -> None:
        """Forget everything. The room is kept for a batch of the same shape."""
        self.tokens_seen.zero_()
        self.tokens_written.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` [B] of the batch, in place: a compiled step knows the buffers by their addresses."""
        if len(beam_idx) != self.batch_size:
            super().reorder_cache(beam_idx)
        else:
            for buffer in self.streams:
                buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """See :meth:`StreamLayer.apply`."""
        self.streams = tuple(change(buffer) for buffer in self.streams)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`StreamLayer.state`: of the room, what is filled."""
        filled = min(int(self.tokens_written), self.num_slots)
        return {**named("stream", [buffer[..., :filled, :] for buffer in self.streams]), "written": self.tokens_written}

    def load_state(self, tensors: Mapping[str, Tensor], tokens_seen: int) -> None:
        """See :meth:`StreamLayer.load_state`."""
        streams = numbered("stream", tensors)
        if streams:
            self._take_room(streams)
            for buffer, stream in zip(self.streams, streams, strict=True):
                buffer[..., : stream.shape[-2], :] = stream
        self.tokens_seen.fill_(tokens_seen)
        self.tokens_written.copy_(tensors["written"])
