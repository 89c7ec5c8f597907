"""The KV cache of tied layers inside Transformers: it holds the tie's basis streams, so one tensor where K and V are proportional.

A layer's K and V are linear in a few *streams*: one tensor [B, G, S, D] for a tie of cached rank 1, two for rank 2, and beside them the
shared rotary key [B, 1, S, d_r] of layers that have one. :class:`TiedLayer` holds the streams of one layer and grows token by token; whatever
Transformers does to a cache (beams, cropping, offloading ...) happens to every stream once, never to a key and a value apart. :class:`TiedCache`
is a model's worth of them, a Transformers ``Cache`` that ``generate`` takes.

Shapes: B batch, G KV heads, T new tokens, S tokens held, D head_dim, d_r length of the shared rotary key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from twofold.errors import TwofoldError
from twofold.spec import ModelSpec

LAYER_TYPE = "twofold_tied"
"""The name under which Transformers knows :class:`TiedLayer`; no layer type of its own."""


class TiedLayer(CacheLayerMixin):
    """The streams of one layer, growing as tokens come.

    With ``window_tokens`` w > 0 it holds the last w tokens, which are all that a window of w lets the next query see; 0 holds everything.
    A trimmed layer cannot go back more than one token, unless :meth:`activate_past_recording` was called before.
    """

    _layer_type = LAYER_TYPE
    supports_early_init = False

    def __init__(self, window_tokens: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.window_tokens = window_tokens
        self.streams: tuple[Tensor, ...] = ()
        self.tokens_seen = 0
        self.record_past = False

    # What attention calls.

    def append(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Hold T more tokens of every stream [B, G, T, D]; all that the new tokens' queries may see, as [B, G, S, D].

        Raises TwofoldError if the streams are not those of the tokens before: another number, batch, or size.
        """
        first = 0
        if self.streams:
            self._check(streams)
            first = self._first_needed
            held = self.streams if self.record_past else [stream[..., first:, :] for stream in self.streams]
            grown = [torch.cat(pair, dim=-2) for pair in zip(held, streams, strict=True)]
        else:
            grown = [_with_storage_of_its_own(stream) for stream in streams]
        self.tokens_seen += streams[0].shape[-2]
        self.device = streams[0].device
        self.is_initialized = True
        self._hold(grown)
        return tuple(stream[..., first:, :] if self.record_past else stream for stream in grown)

    def update(self, key_states: Tensor, value_states: Any = (), *_: Any, **__: Any) -> tuple[Tensor, Any]:
        """:meth:`append` under Transformers' name and in its shape: the first stream, and a tuple of the others."""
        first, *others = self.append((key_states, *value_states))
        return first, tuple(others)

    def _hold(self, grown: Iterable[Tensor]) -> None:
        if self.window_tokens and not self.record_past:
            grown = [_with_storage_of_its_own(stream[..., -self.window_tokens :, :]) for stream in grown]
        self.streams = tuple(grown)

    @property
    def _tokens_held(self) -> int:
        return self.streams[0].shape[-2] if self.streams else 0

    @property
    def _first_needed(self) -> int:
        """The first held token that the next query may see: it sees itself and w - 1 before it."""
        return max(0, self._tokens_held - (self.window_tokens - 1)) if self.window_tokens else 0

    def _check(self, streams: Sequence[Tensor]) -> None:
        held = [_without_tokens(stream) for stream in self.streams]
        new = [_without_tokens(stream) for stream in streams]
        if held != new:
            raise TwofoldError(
                f"The cache holds streams of shape {held} (batch, KV heads, head_dim) and was given {new}: use one cache for one batch of one model."
            )

    # What Transformers calls.

    @property
    def keys(self) -> Tensor | None:
        """The first stream, for code that asks a layer where its tensors are; None while it is empty."""
        return self.streams[0] if self.streams else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:
        """The second stream where there are two, else the first: V is proportional to it."""
        return self.streams[min(1, len(self.streams) - 1)] if self.streams else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @staticmethod
    def _refuse_assignment(value: Tensor | None) -> None:
        # Transformers' constructor assigns None. Anything else would split one tensor into a key and a value.
        if value is not None:
            raise TwofoldError("A tied cache layer holds streams, not keys and values: assign to .streams.")

    @property
    def is_sliding(self) -> bool:
        """Whether the layer forgets tokens."""
        return self.window_tokens > 0

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back any number of tokens."""
        return not self.window_tokens or self.record_past

    def lazy_initialization(self, key_states: Tensor, value_states: Any) -> None:  # noqa: ARG002 (the name that Transformers fixes)
        """Nothing to prepare: the first tokens bring their own shapes."""
        self.device = key_states.device

    def get_seq_length(self) -> int:
        """Tokens seen so far, whether or not they are still held."""
        return self.tokens_seen

    def get_max_length(self) -> int:
        """-1: the layer takes any number of tokens."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """S, the keys that ``query_length`` new tokens will see, and the position of the first of them."""
        remaining = self._tokens_held - self._first_needed
        return remaining + query_length, self.tokens_seen - remaining

    def activate_past_recording(self) -> None:
        """Keep all tokens until the next :meth:`crop`, so that it can go back (as assisted generation does)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a negative number, as in Transformers), and whatever the window no longer needs.

        Raises TwofoldError for a positive number, for more tokens than were seen, and where the window has already dropped what would be needed.
        """
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 counts them in a tensor
        self.check_crop(tokens_to_remove)
        if not self.streams:
            return
        self.tokens_seen += tokens_to_remove
        end = max(0, self._tokens_held + tokens_to_remove)
        start = max(0, end - self.window_tokens) if self.window_tokens else 0
        self._apply(lambda stream: _with_storage_of_its_own(stream[..., start:end, :]))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what :meth:`crop` would raise, and change nothing."""
        removed, kept = -tokens_to_remove, self.tokens_seen + tokens_to_remove
        if removed < 0 or kept < 0:
            raise TwofoldError(
                f"A cache of {self.tokens_seen} tokens cannot be cropped by {tokens_to_remove}: give minus the tokens to remove."
            )
        needed = min(kept, self.window_tokens - 1) if self.window_tokens else kept
        if max(0, self._tokens_held - removed) < needed:
            raise TwofoldError(
                f"A window of {self.window_tokens} tokens has dropped what cropping {removed} would need: call activate_past_recording() first."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` [B] of the batch, as beam search does."""
        self._apply(lambda stream: stream.index_select(0, beam_idx.to(stream.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._apply(lambda stream: stream.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` of the batch."""
        self._apply(lambda stream: stream[indices.to(stream.device)])

    def offload(self) -> None:
        """Move the streams to main memory."""
        self._apply(lambda stream: stream.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the streams back to where they are read."""
        self._apply(lambda stream: stream.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything; a layer of any other batch may follow."""
        self.streams, self.tokens_seen, self.is_initialized = (), 0, False

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        self.streams = tuple(change(stream) for stream in self.streams)

    @property
    def batch_size(self) -> int:
        """B; -1 while the layer is empty."""
        return self.streams[0].shape[0] if self.streams else -1

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that the streams occupy, measured on their storages and not calculated from shapes."""
        return storage_bytes(self.streams)


class TiedCache(DynamicCache):
    """The cache of a model: one :class:`TiedLayer` per layer, with that layer's window.

    ``generate`` and the model make one by themselves; make it by hand to keep it between calls or to look at ``nbytes``.
    """

    def __init__(self, spec: ModelSpec) -> None:
        windows = [spec.attention(index).window_tokens for index in range(spec.num_hidden_layers)]
        Cache.__init__(self, layers=[TiedLayer(window) for window in windows])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """:meth:`TiedLayer.crop` of every layer, or of none: where one refuses, the others still hold what they held."""
        for layer in self.layers:
            layer.check_crop(int(tokens_to_remove))
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that all layers occupy; equals ``cost.cache_bytes``, until :meth:`crop` leaves a window less than full."""
        return storage_bytes(stream for layer in self.layers for stream in layer.streams)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The streams, layer by layer."""
        return (layer.streams for layer in self.layers)


class LayerView:
    """One layer of a cache as attention sees it: ``update(streams) -> streams``."""

    def __init__(self, cache: Cache, layer_index: int) -> None:
        if layer_index >= len(cache.layers) or not isinstance(cache.layers[layer_index], TiedLayer):
            raise TwofoldError(
                f"A {type(cache).__name__} keeps keys and values apart and cannot hold tied streams: use twofold.cache.TiedCache(model.config.spec)."
            )
        self.cache = cache
        self.layer_index = layer_index
        self.layer: TiedLayer = cache.layers[layer_index]

    @property
    def tokens_seen(self) -> int:
        """Tokens before those that the next update brings: the position of its first token."""
        return self.layer.tokens_seen

    def update(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Append the new tokens' streams [B, G, T, D]; all that they may see, [B, G, S, D]."""
        # Through the cache and not straight to the layer: offloading happens there.
        first, others = self.cache.update(streams[0], streams[1:], self.layer_index)
        return (first, *others)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under some tensors: a view costs nothing twice, and a slice costs all that it keeps alive."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _with_storage_of_its_own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a slice of something larger: holding the slice would hold all of that."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _without_tokens(stream: Tensor) -> tuple[int, ...]:
    return (*stream.shape[:-2], stream.shape[-1])
