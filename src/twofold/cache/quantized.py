"""A layer that grows and holds its old tokens in few bits, and the youngest as they were computed.

A query reads the tokens of its own pass as they were computed, and all older ones as they are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from twofold.cache.layer import StreamLayer, check_like, named, numbered, with_storage_of_its_own
from twofold.cache.quantization import Quantized, quantize
from twofold.cache_spec import CacheSpec
from twofold.errors import TwofoldError
from twofold.rotations import Span


class QuantizedTiedLayer(StreamLayer):
    """Every stream as codes and a tail; how many tokens are codes depends on the number of tokens alone (``CacheSpec.quantized_tokens``)."""

    _layer_type = "twofold_tied_quantized"
    is_croppable = True

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__()
        self.spec = spec
        self.old: tuple[Quantized, ...] = ()
        self.tail: tuple[Tensor, ...] = ()
        self.tokens_seen: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales, zero points, and the tails."""
        return (*self.tail, *(tensor for old in self.old for tensor in old.tensors))

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """What the next query will read: the codes as floats, and the tail."""
        if not self.old:
            return self.tail
        return tuple(
            torch.cat((old.read(self.spec), tail), dim=-2) for old, tail in zip(self.old, self.tail, strict=True)
        )

    @streams.setter
    def streams(self, _: tuple[Tensor, ...]) -> None:
        raise TwofoldError(
            "A quantized layer's streams are made when they are read: append to it instead of assigning to them."
        )

    @property
    def tokens_kept(self) -> int:
        """All of them."""
        return self.tokens_seen

    def append(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :meth:`StreamLayer.append`."""
        if self.tail:
            check_like(self.tail, streams)
            read = tuple(torch.cat(pair, dim=-2) for pair in zip(self.streams, streams, strict=True))
            tail = [torch.cat(pair, dim=-2) for pair in zip(self.tail, streams, strict=True)]
        else:
            for stream in streams:
                self.spec.group(stream.shape[-1])
            read, tail = tuple(streams), list(streams)
        self.tokens_seen += streams[0].shape[-2]
        self.device = streams[0].device
        self.is_initialized = True
        self._hold(tail)
        return read

    def _hold(self, tail: Sequence[Tensor]) -> None:
        """Turn into codes what is too old for the tail."""
        held = self.old[0].codes.shape[-2] if self.old else 0
        count = self.spec.quantized_tokens(self.tokens_seen) - held
        if count > 0:
            new = [quantize(stream[..., :count, :], self.spec) for stream in tail]
            self.old = tuple(a.followed_by(b) for a, b in zip(self.old, new, strict=True)) if self.old else tuple(new)
            tail = [stream[..., count:, :] for stream in tail]
        self.tail = tuple(with_storage_of_its_own(stream) for stream in tail)

    def key_positions(self, num_keys: int) -> Span:
        """All."""
        return Span(self.tokens_seen - num_keys, self.tokens_seen)

    def crop_to(self, tokens: int) -> None:
        """See :meth:`StreamLayer.crop_to`. Codes that fall into the tail are floats again, no better than they were."""
        streams, kept = self.streams, self.spec.quantized_tokens(tokens)
        self.old = tuple(old.first(kept, self.spec) for old in self.old) if kept else ()
        self.tail = tuple(stream[..., kept:tokens, :].clone() for stream in streams)
        self.tokens_seen = tokens

    def reset(self) -> None:
        """Forget everything; a layer of any other batch may follow."""
        self.old, self.tail, self.tokens_seen, self.is_initialized = (), (), 0, False

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """See :meth:`StreamLayer.apply`."""
        self.tail = tuple(change(stream) for stream in self.tail)
        self.old = tuple(old.changed(change) for old in self.old)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`StreamLayer.state`."""
        old = [tensor for quantized in self.old for tensor in quantized.tensors]
        return {**named("tail", self.tail), **named("old", old)}

    def load_state(self, tensors: Mapping[str, Tensor], tokens_seen: int) -> None:
        """See :meth:`StreamLayer.load_state`."""
        old = numbered("old", tensors)
        self.tail, self.tokens_seen = numbered("tail", tensors), tokens_seen
        self.old = tuple(
            Quantized(codes=c, scale=s, zero=z) for c, s, z in zip(old[::3], old[1::3], old[2::3], strict=True)
        )
        if self.tail:
            self.device, self.is_initialized = self.tail[0].device, True
