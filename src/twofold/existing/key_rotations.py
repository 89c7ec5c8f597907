"""How keys turn when they are read, in a model that others wrote: by the model's own table, at the positions where the keys stand.

Transformers hands a layer the cosines and sines of the new tokens only, because it caches keys that are turned already. A cache of keys as they were
projected needs those of all tokens. They are taken from the model's own rotary module, so that they are its numbers, bit for bit.

Shapes: B batch, T new tokens, S keys, D head_dim, n pairs that turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.kernels import Rotation

# Frequencies that depend on how long the text is would turn the keys of a text differently as it grows.
_FIXED_TYPES = frozenset({"default", "linear", "proportional", "yarn", "llama3"})


@dataclass
class KeyRotations:
    """The turning of keys by a model's rotary module; ``layer_type`` names one of several kinds of layer, where the module has them."""

    module: nn.Module
    layer_type: str | None
    pairs: int
    distance: int
    is_scaled: bool = False
    _tables: dict[tuple[torch.device, torch.dtype], Rotation] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, layer_type: str | None, rotary_dim: int) -> KeyRotations:
        """Raises TwofoldError for frequencies that change with the length of the text."""
        kinds: Any = getattr(module, "rope_type", "default")
        kind = kinds.get(layer_type, "default") if isinstance(kinds, dict) else kinds
        if kind not in _FIXED_TYPES:
            raise TwofoldError(
                f"its rotary positions are {kind!r}, whose frequencies change with the length of the text, so no key can be turned later"
            )
        prefix = f"{layer_type}_" if isinstance(kinds, dict) else ""
        frequencies: Tensor = getattr(module, f"{prefix}inv_freq")
        scaled = getattr(module, f"{prefix}attention_scaling", 1.0) != 1.0
        pairs = frequencies.numel() if scaled else int((frequencies != 0).sum())
        if not scaled and bool((frequencies[:pairs] == 0).any()):
            pairs = frequencies.numel()
        return cls(module, layer_type if isinstance(kinds, dict) else None, pairs, rotary_dim // 2, scaled)

    def of_tokens(self, position_embeddings: tuple[Tensor, Tensor]) -> Rotation:
        """The turning at the positions of the new tokens, from what the layer was given: cosines and sines [B or 1, T, 2·distance]."""
        cosine, sine = (table[:, None, :, : self.pairs] for table in position_embeddings)
        return Rotation(cosine=cosine, sine=sine, distance=self.distance)

    def at(self, positions: Tensor, like: Tensor) -> Rotation:
        """The turning at ``positions`` [B or 1, S], in the dtype of ``like``."""
        if torch.compiler.is_compiling():
            return self.of_tokens(self._angles(positions, like))
        key = (like.device, like.dtype)
        # Looking at the last position waits for the device once per layer and step; a table saves making all of it anew.
        length = int(positions.max()) + 1
        table = self._tables.get(key)
        if table is None or table.cosine.shape[-2] < length:
            with torch.inference_mode(False), torch.no_grad():
                every = torch.arange(1 << (length - 1).bit_length(), device=like.device)[None]
                # Read here and not from the dictionary, where another thread may have put a shorter one since.
                self._tables[key] = table = self._table(every, like.new_empty(1))
        if positions.shape[0] == 1 or bool((positions == positions[:1]).all()):
            first = int(positions[0, 0])
            if bool((positions[0] == torch.arange(first, first + positions.shape[1], device=positions.device)).all()):
                rows = slice(first, first + positions.shape[1])
                cosine, sine, *steady = (part[:, :, rows] for part in (table.cosine, table.sine, *(table.steady or ())))
                fine = (steady[0], steady[1]) if steady else None
                return Rotation(cosine=cosine, sine=sine, distance=self.distance, steady=fine)
        return Rotation(
            cosine=table.cosine[0, 0][positions][:, None],
            sine=table.sine[0, 0][positions][:, None],
            distance=self.distance,
        )

    def _table(self, positions: Tensor, like: Tensor) -> Rotation:
        """Of successive positions, which turn steadily: in float32 too, for kernels that need not read every row, unless the module scales what it turns."""
        rotation = self.of_tokens(self._angles(positions, like))
        if self.is_scaled:
            return rotation
        fine = self.of_tokens(self._angles(positions, like.float()))
        return replace(rotation, steady=(fine.cosine, fine.sine))

    def _angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (like, positions) if self.layer_type is None else (like, positions, self.layer_type)
        return self.module(*arguments)


def key_positions(
    num_keys: int, total: int | Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Where each of S cached keys stands, [B or 1, S], given the positions [B or 1, T] of the new tokens, the last of ``total`` that have been read.

    New keys stand where they are said to stand. An older one stands before a new token that sees it. Tokens of a text are successive, so it is as far
    before that one as its slot is before that one's; where a window has let go of earlier ones, too. But a token that stands before its slot counts only the
    tokens that it sees, as ``generate`` counts those that are no padding: so does every key before it, and the mask [B or 1, 1 or H, T, S] says which
    slots it does not see, padding in the middle of a text and the other branches of a tree among them. Slots that nobody sees get some position or other
    that the table has.
    """
    slots, num_new = torch.arange(num_keys, device=position_ids.device), position_ids.shape[1]
    filled = total.clamp(max=num_keys) if isinstance(total, Tensor) else min(total, num_keys)
    own = slots[:num_new] + (filled - num_new)  # the slots of the new tokens
    if attention_mask is None:
        older = slots - own[0] + position_ids[:, :1]
    else:
        batch = max(len(position_ids), len(attention_mask))
        position_ids = position_ids.expand(batch, -1)
        seen = is_seen(attention_mask)[:, 0].expand(batch, -1, -1)
        themselves = own[None, :, None].expand(batch, -1, 1)
        # [B, S], the first of the new tokens that sees a key, and itself: padding, which may stand anywhere, does not.
        asking = (seen & seen.gather(2, themselves)).byte().argmax(dim=1)
        place, position = own[asking], position_ids.gather(1, asking)
        counted = seen.cumsum(dim=-1, dtype=torch.int32)
        up_to_itself = counted.gather(2, themselves)[..., 0].gather(1, asking)
        by_count = counted.gather(1, asking[:, None])[:, 0] - up_to_itself + position
        older = torch.where(position < place + (total - filled), by_count, slots - place + position)
    if num_new > 1:
        index = slots - own[0]
        new = position_ids.gather(1, index.clamp(0, num_new - 1).expand(len(position_ids), -1))
        older = torch.where((index >= 0) & (index < num_new), new, older)
    return older.clamp(min=0)


def is_seen(attention_mask: Tensor) -> Tensor:
    """Which keys a mask lets be seen, True: of a mask that is added to the logits, those to which it adds no number as good as minus infinity."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2
