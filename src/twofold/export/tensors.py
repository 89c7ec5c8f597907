"""The cached tensors of an exported decoder: what they are called, and their shapes. No torch.

Names follow Hugging Face's optimum: what the next step reads is ``past_key_values.{layer}.{part}``, what a step gives is
``present.{layer}.{part}``, and a layer that caches K and V calls them ``key`` and ``value``. Where V = cK there is one tensor, the ``stream``: not
``key``, since it is the value as well (and is turned into a key only when it is read), nor optimum's ``key_value``, which is both side by side. The
one rotary key that all heads share is ``shared_key``, the latent of which keys and values are made ``latent``.

Shapes: B batch, T new tokens, P tokens before them, G KV heads, D head_dim, d_r length of the shared rotary key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.cost import cached_bytes_per_token, cached_floats_per_layer, cached_streams, dtype_bytes
from twofold.spec import ModelSpec

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"
BATCH, TOKENS, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {TOKENS}"
"""Names of dynamic axes, optimum's own."""


@dataclass(frozen=True, kw_only=True)
class CachedTensor:
    """One cached tensor of one layer, [B, ``heads``, P, ``dim``]; with ``window_tokens`` w > 0 it holds the last w of the P tokens."""

    layer: int
    part: str
    heads: int
    dim: int
    window_tokens: int = 0

    @property
    def input(self) -> str:
        """The name under which a step reads it."""
        return f"past_key_values.{self.layer}.{self.part}"

    @property
    def output(self) -> str:
        """The name under which a step gives it, the new tokens appended."""
        return f"present.{self.layer}.{self.part}"

    @property
    def past_axis(self) -> str:
        """The name of the axis of tokens on the way in: layers with one window share it."""
        return f"past_window_{self.window_tokens}_length" if self.window_tokens else PAST

    @property
    def present_axis(self) -> str:
        """The name of the axis of tokens on the way out."""
        return f"present_window_{self.window_tokens}_length" if self.window_tokens else TOTAL


def cached_tensors(spec: ModelSpec) -> tuple[tuple[CachedTensor, ...], ...]:
    """The cached tensors of every layer, in the order of the file's inputs and outputs."""
    return tuple(_of_layer(spec, index) for index in range(spec.num_hidden_layers))


def _of_layer(spec: ModelSpec, index: int) -> tuple[CachedTensor, ...]:
    attention = spec.attention(index)
    parts = (
        ["latent"] if attention.latent_dim else ["stream"] if attention.tie.cached_tensors == 1 else ["key", "value"]
    )
    parts += ["shared_key"] if attention.positions.key_extension_dim else []
    return tuple(
        CachedTensor(layer=index, part=part, heads=heads, dim=dim, window_tokens=attention.window_tokens)
        for part, (heads, dim) in zip(parts, cached_streams(attention), strict=True)
    )


def cache_facts(spec: ModelSpec, *, dtype: str, max_tokens: int) -> dict[str, Any]:
    """What a program that feeds the file must know, JSON-ready: tensors, bytes, and the longest text."""
    layers = [
        {
            "tie": str(spec.attention(index).tie),
            "window_tokens": spec.attention(index).window_tokens,
            "bytes_per_token": cached_floats_per_layer(spec.attention(index)) * dtype_bytes(dtype),
            "tensors": [
                {"input": tensor.input, "output": tensor.output, "heads": tensor.heads, "dim": tensor.dim}
                for tensor in tensors
            ],
        }
        for index, tensors in enumerate(cached_tensors(spec))
    ]
    return {
        "tie": str(spec.tie),
        "dtype": dtype,
        "bytes_per_token": cached_bytes_per_token(spec, dtype),
        "max_tokens": max_tokens,
        "layers": layers,
    }
