"""Gemma 4's scheme: K and V are one projection under two norms that divide by the same length, so one tensor holds both.

With p = k_proj(x) and n = p / rms(p) a full-attention layer has V = n and K = rotary(s ⊙ n), the learned scale s belonging to ``k_norm``. Cached is n
alone; keys are scaled and turned when they are read. That is exact: the same numbers are multiplied in the same order. In the terms of this
package the layer is (Q, K=V) with rotary positions turned on reading.

Shapes: B batch, T new tokens, S keys, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.existing.key_rotations import KeyRotations
from twofold.existing.reading import Held, Reader, append, cache_of, check_is_here, read
from twofold.existing.refusals import why_strange
from twofold.kernels import Rotation

CLASSES = frozenset(
    {
        "Gemma4TextAttention",
        "Gemma4UnifiedTextAttention",
        "DiffusionGemmaEncoderTextAttention",
        "DiffusionGemmaDecoderTextAttention",
    }
)
"""The attention modules of Transformers that are built so."""
PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "v_norm"})


def reads_only(layer: nn.Module) -> bool:
    """Whether a layer has no cache of its own, but reads what an encoder's layer has cached."""
    return type(layer).__name__ == "DiffusionGemmaDecoderTextAttention"


def why_not(layer: Any) -> str:
    """Why a layer of one of :data:`CLASSES` cannot be held in one tensor; empty: it can. Read from the module itself, not from its config."""
    if layer.v_proj is not None:
        return "it projects its values apart from its keys, and normalizes both"
    if layer.k_norm.eps != layer.v_norm.eps:
        return f"k_norm and v_norm divide by different lengths (eps {layer.k_norm.eps} and {layer.v_norm.eps})"
    if type(layer.k_norm) is not type(layer.v_norm) or getattr(layer.v_norm, "with_scale", True):
        return "v_norm is not k_norm without its scale"
    return why_strange(layer, PARTS)


class SharedStates(Sequence[Tensor]):
    """Keys and values [B, G, S, D] as later layers, and a drafting model, read them: made when somebody does, which in most models is nobody."""

    def __init__(self, stream: Tensor, scale: Tensor, rotation: Rotation | None) -> None:
        self._stream, self._scale, self._rotation = stream, scale, rotation
        self._keys: Tensor | None = None

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        if index not in (0, 1):
            raise IndexError(index)
        if index == 1:
            return self._stream
        if self._keys is None:
            scaled = self._stream * self._scale
            self._keys = scaled if self._rotation is None else self._rotation.turn(scaled)
        return self._keys


class SharedNormForward:
    """What the layer does in place of its own forward."""

    def __init__(self, layer: Any, rotary: nn.Module) -> None:
        self.layer = layer
        self.rotations = KeyRotations.of(rotary, layer.layer_type, layer.head_dim)
        self.reads_only = reads_only(layer)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        shared_kv_states: Any = None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's own forward, argument by argument; ``cache`` may have its old name, ``past_key_values``."""
        layer: Any = self.layer
        check_is_here(layer.k_norm.weight)
        reader = Reader(layer, attention_mask, arguments)
        heads = (*hidden_states.shape[:-1], -1, layer.head_dim)
        own = self.rotations.of_tokens(position_embeddings)
        query = own.turn(layer.q_norm(layer.q_proj(hidden_states).view(heads)).transpose(1, 2))
        stream = layer.v_norm(layer.k_proj(hidden_states).view(heads)).transpose(1, 2)
        held = self._held(stream, own, arguments | {"attention_mask": attention_mask})
        scale = layer.k_norm.weight.to(stream.dtype)
        if getattr(layer, "store_full_length_kv", False):
            shared_kv_states[layer.layer_type] = SharedStates(held.stream, scale, held.rotation)
        output, weights = reader.attend(query, held.stream, held.stream, held.rotation, key_scale=scale)
        return layer.o_proj(output.transpose(1, 2).flatten(2)), weights

    def _held(self, stream: Tensor, own: Rotation, arguments: dict[str, Any]) -> Held:
        """All tokens; those of a decoder that only reads what an encoder has cached come after it."""
        layer, cache = self.layer, cache_of(arguments)
        if cache is None:
            return Held(stream, own, is_new=True)
        if self.reads_only:
            seen = cache.get_seq_length(layer.layer_idx)
            every, _ = layer.append_to_cache(cache, stream, stream[..., :0])
        else:
            every, seen = append(cache, stream, layer.layer_idx)
        return read(
            layer,
            (stream, every),
            seen,
            self.rotations,
            own,
            (arguments.get("position_ids"), arguments["attention_mask"]),
        )


def rotary_of(model: nn.Module, name: str) -> nn.Module:
    """The rotary module of the stack of layers to which the attention module ``name`` belongs."""
    stack = model.get_submodule(name.rpartition(".layers.")[0])
    rotary = getattr(stack, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise TwofoldError(
            f"{name} belongs to no stack of layers with a rotary_emb: this model is not built as Gemma 4 is."
        )
    return rotary


def check_pairs(model: nn.Module) -> None:
    """A decoder that reads what an encoder has cached must scale keys as it does. Raises TwofoldError where it does not."""
    decoders: dict[str, Any] = {name: layer for name, layer in model.named_modules() if reads_only(layer)}
    for name, decoder in decoders.items():
        encoder: Any = model.get_submodule(name.replace("decoder.", "encoder.language_model.", 1))
        if not torch.equal(decoder.k_norm.weight, encoder.k_norm.weight):
            raise TwofoldError(
                f"{name} scales keys in another way than the encoder whose cache it reads: tie their weights first."
            )
