"""One layer of a cache: the streams of its tie, whatever Transformers does to them done to every stream once.

A layer's K and V are linear in a few *streams*: one tensor [B, G, S, D] for a tie of cached rank 1, two for rank 2, and beside them the
shared rotary key [B, 1, S, d_r] of layers that have one. A stream that is held as codes of 8 bits is two tensors, codes [B, G, S, D] and scales
[B, G, S, 1], and whatever is done to streams is done to both. :class:`StreamLayer` is what all kinds of layer share; :class:`TiedLayer` grows
token by token.

Shapes: B batch, G KV heads, T new tokens, S tokens held, D head_dim, d_r length of the shared rotary key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from twofold.errors import TwofoldError
from twofold.kernels.codes import Codes, Held, encoded
from twofold.rotations import Positions, Span

LAYER_TYPE = "twofold_tied"
"""The name under which Transformers knows our layers; no layer type of its own."""


class StreamLayer(CacheLayerMixin):
    """What every kind of layer shares; a kind says what it holds, and how tokens come and go.

    ``window_tokens`` w > 0: queries see the last w tokens; 0: all. ``num_coded``: how many streams, the first ones, :meth:`update` turns into codes.
    ``tensors`` is all that the layer holds, each with the batch first.
    """

    supports_early_init = False

    def __init__(self, window_tokens: int = 0, num_coded: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.window_tokens = window_tokens
        self.num_coded = num_coded

    # What a kind of layer says.

    streams: tuple[Tensor, ...]
    """What a query would read [B, G, S, D]; empty before the first token."""

    tokens_seen: int | Tensor
    """Tokens so far, whether or not they are still held: the position of the next one."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.streams

    @abstractmethod
    def append(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Hold T more tokens of every stream [B, G, T, D]; all that the new tokens' queries may see, as [B, G, S, D].

        Raises TwofoldError, and holds what it held, if the streams are not those of the tokens before: another number, batch, size, dtype or device.
        """

    @abstractmethod
    def key_positions(self, num_keys: int) -> Positions:
        """Where the ``num_keys`` keys that :meth:`append` just gave stand in the text: S positions, negative where there is no key yet."""

    @abstractmethod
    def crop_to(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens, which are known to be there, and whatever the window no longer needs."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is held, by name, to be written to a file."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor], tokens_seen: int) -> None:
        """Hold what another layer of the same kind held."""

    @property
    @abstractmethod
    def tokens_kept(self) -> int:
        """How many of the last tokens are still held."""

    @property
    def next_position(self) -> int | Tensor:
        """:attr:`tokens_seen` as attention wants it: a number, unless looking at it would wait for the device."""
        return self.tokens_seen

    def check_room(self, num_tokens: int) -> None:
        """Raise TwofoldError if ``num_tokens`` more cannot be held."""

    # What attention and Transformers call.

    def update(self, key_states: Tensor, value_states: Any = (), *_: Any, **__: Any) -> tuple[Held, Any]:
        """:meth:`append` under Transformers' name and in its shape: the first stream, and a tuple of the others.

        Those that are held as codes are read as codes, the new tokens' own too: decoding token by token is then what one pass over all is.
        """
        streams, count = (key_states, *value_states), self.num_coded
        held = self.append((*(part for stream in streams[:count] for part in encoded(stream)), *streams[count:]))
        codes = [Codes(codes=held[i], scales=held[i + 1], dtype=key_states.dtype) for i in range(0, 2 * count, 2)]
        read: tuple[Held, ...] = (*codes, *held[2 * count :])
        return read[0], read[1:]

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
        second = 2 if self.num_coded else 1
        return self.streams[second if second < len(self.streams) else 0] if self.streams else None

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

    def lazy_initialization(self, key_states: Tensor, value_states: Any) -> None:  # noqa: ARG002 (the name that Transformers fixes)
        """Nothing to prepare: the first tokens bring their own shapes."""
        self.device = key_states.device

    def get_seq_length(self) -> int | Tensor:
        """Tokens seen so far, whether or not they are still held."""
        return self.tokens_seen

    def get_max_length(self) -> int:
        """-1: the layer takes any number of tokens."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """S, the keys that ``query_length`` new tokens will see, and the position of the first of them."""
        seen = int(self.tokens_seen)
        remaining = min(self.tokens_kept, self.window_tokens - 1) if self.window_tokens else self.tokens_kept
        return remaining + query_length, seen - remaining

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a negative number, as in Transformers), and whatever the window no longer needs.

        Raises TwofoldError for a positive number, for more tokens than were seen, and where the window has already dropped what would be needed.
        """
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 counts them in a tensor
        self.check_crop(tokens_to_remove)
        if self.tensors:
            self.crop_to(int(self.tokens_seen) + tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what :meth:`crop` would raise, and change nothing."""
        seen = int(self.tokens_seen)
        removed, kept = -tokens_to_remove, seen + tokens_to_remove
        if removed < 0 or kept < 0:
            raise TwofoldError(
                f"A cache of {seen} tokens cannot be cropped by {tokens_to_remove}: give minus the tokens to remove."
            )
        needed = min(kept, self.window_tokens - 1) if self.window_tokens else kept
        if max(0, self.tokens_kept - removed) < needed:
            raise TwofoldError(
                f"A window of {self.window_tokens} tokens has dropped what cropping {removed} would need: call activate_past_recording() first."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` [B] of the batch, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` of the batch."""
        self.apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move what is held to main memory."""
        self.apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move it back to where it is read."""
        self.apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    @abstractmethod
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held, all of which have the batch first."""

    @property
    def batch_size(self) -> int:
        """B; -1 while the layer is empty."""
        return self.tensors[0].shape[0] if self.tensors else -1

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that is held, measured on the storages and not calculated from shapes."""
        return storage_bytes(self.tensors)


class TiedLayer(StreamLayer):
    """The streams of one layer, growing as tokens come.

    With a window of w it holds the last w tokens, which are all that the window lets the next query see.
    A trimmed layer cannot go back more than one token, unless :meth:`activate_past_recording` was called before.
    """

    _layer_type = LAYER_TYPE

    def __init__(self, window_tokens: int = 0, num_coded: int = 0, **options: Any) -> None:
        super().__init__(window_tokens, num_coded, **options)
        self.streams: tuple[Tensor, ...] = ()
        self.tokens_seen: int = 0
        self.record_past = False

    def append(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :meth:`StreamLayer.append`."""
        first = 0
        if self.streams:
            check_like(self.streams, streams)
            first = self._first_needed
            held = self.streams if self.record_past else [stream[..., first:, :] for stream in self.streams]
            grown = [torch.cat(pair, dim=-2) for pair in zip(held, streams, strict=True)]
        else:
            grown = [with_storage_of_its_own(stream) for stream in streams]
        self.tokens_seen += streams[0].shape[-2]
        self.device = streams[0].device
        self.is_initialized = True
        self._hold(grown)
        return tuple(stream[..., first:, :] if self.record_past else stream for stream in grown)

    def _hold(self, grown: Iterable[Tensor]) -> None:
        if self.window_tokens and not self.record_past:
            grown = [with_storage_of_its_own(stream[..., -self.window_tokens :, :]) for stream in grown]
        self.streams = tuple(grown)

    @property
    def tokens_kept(self) -> int:
        """How many of the last tokens are still held."""
        return self.streams[0].shape[-2] if self.streams else 0

    @property
    def _first_needed(self) -> int:
        """The first held token that the next query may see: it sees itself and w - 1 before it."""
        return max(0, self.tokens_kept - (self.window_tokens - 1)) if self.window_tokens else 0

    def key_positions(self, num_keys: int) -> Span:
        """The last ones."""
        return Span(self.tokens_seen - num_keys, self.tokens_seen)

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back any number of tokens."""
        return not self.window_tokens or self.record_past

    def activate_past_recording(self) -> None:
        """Keep all tokens until the next :meth:`crop`, so that it can go back (as assisted generation does)."""
        self.record_past = True

    def crop_to(self, tokens: int) -> None:
        """See :meth:`StreamLayer.crop_to`."""
        end = max(0, self.tokens_kept + tokens - self.tokens_seen)
        start = max(0, end - self.window_tokens) if self.window_tokens else 0
        self.tokens_seen = tokens
        self.apply(lambda stream: with_storage_of_its_own(stream[..., start:end, :]))

    def reset(self) -> None:
        """Forget everything; a layer of any other batch may follow."""
        self.streams, self.tokens_seen, self.is_initialized = (), 0, False

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """See :meth:`StreamLayer.apply`."""
        self.streams = tuple(change(stream) for stream in self.streams)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`StreamLayer.state`."""
        return named("stream", self.streams)

    def load_state(self, tensors: Mapping[str, Tensor], tokens_seen: int) -> None:
        """See :meth:`StreamLayer.load_state`."""
        self.streams, self.tokens_seen = numbered("stream", tensors), tokens_seen
        if self.streams:
            self.device, self.is_initialized = self.streams[0].device, True


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under some tensors: a view costs nothing twice, and a slice costs all that it keeps alive."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def with_storage_of_its_own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a slice of something larger: holding the slice would hold all of that."""
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():  # where no storage is seen
        return tensor.clone()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_like(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Raise TwofoldError unless ``new`` may follow ``held``: the same streams of the same batch, in one dtype, on one device."""
    shapes = [[(*stream.shape[:-2], stream.shape[-1]) for stream in streams] for streams in (held, new)]
    if shapes[0] != shapes[1]:
        raise TwofoldError(
            f"The cache holds streams of shape {shapes[0]} (batch, KV heads, head_dim) and was given {shapes[1]}: use one cache for one batch of one model."
        )
    for name in ("dtype", "device"):
        kinds = [[str(getattr(stream, name)).removeprefix("torch.") for stream in streams] for streams in (held, new)]
        if kinds[0] != kinds[1]:
            ours, theirs = (" and ".join(dict.fromkeys(kind)) for kind in kinds)
            raise TwofoldError(
                f"The cache holds streams of {name} {ours} and was given {theirs}: use one cache for one model as it is."
            )


def named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """``name.0``, ``name.1`` ... of some tensors."""
    return {f"{name}.{index}": tensor for index, tensor in enumerate(tensors)}


def numbered(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensors that :func:`named` named."""
    return tuple(tensors[f"{name}.{index}"] for index in range(sum(key.startswith(f"{name}.") for key in tensors)))
