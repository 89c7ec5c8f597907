"""Multi-head models: one of K and V is kept, the other follows from it, and no head ever makes it for the tokens that are cached.

With V = K F + f (see :mod:`twofold.existing.fold`) the output of head h is Σ_s P_hs V_hs = (Σ_s P_hs K_s) F_h + f_h, where K_s are the keys of *all*
heads of token s: every head averages the whole row, H times the arithmetic of the value sum, and half the memory is read. With K = V F + f the same is
done to the query: q_h · K_hs = (F_h q_h) · V_s + a number that is the same for all keys, which no softmax sees. Rotary positions turn keys, so there
only keys can be kept, before they turn.

Shapes: B batch, T new tokens, S keys, H heads, D head_dim, C hidden_size, N = H·D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.existing.fold import Fold, Projection
from twofold.existing.key_rotations import KeyRotations
from twofold.existing.reading import Held, Reader, append, cache_of, check_halved, check_is_here, read
from twofold.existing.refusals import why_no_numbers, why_strange
from twofold.kernels import Rotation
from twofold.kernels.folded import weights_of


@dataclass(frozen=True)
class Family:
    """How the attention modules of some models name their parts.

    ``fused`` is the one module of three projections, whose outputs are Q, K, V one after the other, or head by head (``by_head``); else ``projections``
    names them. ``rotary`` says that keys turn. ``not_linear`` are attributes that, where they are set, make K or V no linear map of the input.
    ``positional`` is what follows the hidden states where a model gives it by place, ``mask`` what it calls the mask. ``hands_on_bias``: what a layer
    adds to its logits is an output, for the layers after it. ``beside`` are parts that it may have besides.
    """

    output: str
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    by_head: bool = False
    rotary: bool = False
    not_linear: tuple[str, ...] = ()
    positional: tuple[str, ...] = ("position_embeddings", "attention_mask", "cache")
    mask: str = "attention_mask"
    hands_on_bias: bool = False
    beside: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The modules that make K and V."""
        return (self.fused,) if self.fused else self.projections[1:]


_LLAMA_LIKE = Family(output="o_proj", rotary=True)
_T5_LIKE = Family(
    output="o",
    projections=("q", "k", "v"),
    positional=("mask", "key_value_states", "position_bias", "cache"),
    mask="mask",
    hands_on_bias=True,
    beside=("relative_attention_bias",),
)
FAMILIES: Mapping[str, Family] = {
    "GPT2Attention": Family(
        output="c_proj",
        fused="c_attn",
        positional=("cache", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "output_attentions"),
        beside=("q_attn",),
    ),
    "OPTAttention": Family(output="out_proj", positional=("cache", "attention_mask", "output_attentions")),
    "GPTNeoXAttention": Family(
        output="dense",
        fused="query_key_value",
        by_head=True,
        rotary=True,
        positional=("attention_mask", "layer_past", "position_embeddings"),
    ),
    "PhiAttention": Family(output="dense", rotary=True, not_linear=("qk_layernorm",)),
    "OlmoAttention": Family(output="o_proj", rotary=True, not_linear=("config.clip_qkv",)),
    "LlamaAttention": _LLAMA_LIKE,
    "MistralAttention": _LLAMA_LIKE,
    "Qwen2Attention": _LLAMA_LIKE,
    "WhisperAttention": Family(
        output="out_proj", positional=("key_value_states", "cache", "attention_mask", "output_attentions")
    ),
    "BartAttention": Family(output="out_proj", positional=("key_value_states", "cache", "attention_mask")),
    "T5Attention": _T5_LIKE,
    "MT5Attention": _T5_LIKE,
    "LongT5Attention": _T5_LIKE,
    "SwitchTransformersAttention": _T5_LIKE,
    "UMT5Attention": Family(
        output="o",
        projections=("q", "k", "v"),
        positional=("encoder_hidden_states", "cache", "attention_mask"),
        beside=("relative_attention_bias",),
    ),
}
"""By the class of the attention module."""


def head_dim(layer: Any) -> int:
    """D, under whatever name."""
    names = ("head_dim", "head_size", "key_value_proj_dim")
    return int(next(size for name in names if (size := getattr(layer, name, None))))


def num_heads(layer: Any) -> tuple[int, int]:
    """(query heads, KV heads)."""
    config = layer.config
    own = getattr(layer, "num_heads", getattr(layer, "n_heads", None))
    heads = own if isinstance(own, int) else config.num_attention_heads
    groups = getattr(layer, "num_key_value_groups", 1)
    return heads, heads // groups


def window_tokens(layer: Any) -> int:
    """How many tokens a layer sees at most; 0: all."""
    return getattr(layer, "sliding_window", getattr(layer.config, "sliding_window", None)) or 0


def family_of(layer: nn.Module) -> Family | None:
    """The family of an attention module; None for one that is not known."""
    return FAMILIES.get(type(layer).__name__)


def has_cache(layer: Any) -> bool:
    """Whether an attention module has a cache: an encoder's has none."""
    return getattr(layer, "layer_idx", None) is not None and bool(getattr(layer, "is_decoder", True))


def why_not(layer: Any, family: Family) -> str:
    """Why K and V of a layer do not follow from one another; empty: they may."""
    heads, kv_heads = num_heads(layer)
    if heads != kv_heads:
        return (
            f"{heads} query heads share {kv_heads} KV heads: K and V are then two independent maps of a larger input, and no linear map makes one "
            "from the other; only retraining with a tie can halve this cache"
        )
    for name in family.not_linear:
        part = layer
        for step in name.split("."):
            part = getattr(part, step, None)
        if part:
            return f"{name} is set, so its keys are no linear map of its input"
    if getattr(layer, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn is set, which is an order of operations that is not kept"
    return why_strange(layer, {*family.projections, family.fused, family.output, *family.beside})


def projections(layer: Any, family: Family) -> tuple[Projection, Projection]:
    """Those of K and V. Raises TwofoldError for weights that are held in another form than numbers."""
    if family.fused:
        weight, bias = _linear(getattr(layer, family.fused))
        heads, size = num_heads(layer)[0], head_dim(layer)
        parts = len(bias) // (heads * size)
        order, part = ((heads, parts, size), 1) if family.by_head else ((parts, heads, size), 0)
        weight = weight.unflatten(1, order).movedim(1 + part, 0).flatten(2)
        bias = bias.unflatten(0, order).movedim(part, 0).flatten(1)
        return Projection(weight[-2], bias[-2]), Projection(weight[-1], bias[-1])
    key, value = (Projection(*_linear(getattr(layer, name))) for name in family.sources)
    return key, value


def weight_dtype(layer: Any, family: Family) -> torch.dtype:
    """Of the numbers in the projections of K and V."""
    dtype: torch.dtype = getattr(layer, family.sources[0]).weight.dtype
    return dtype


def _linear(module: Any) -> tuple[Tensor, Tensor]:
    """W [C, N] and b [N] in float64."""
    if reason := why_no_numbers(module):
        raise TwofoldError(reason)
    weight = module.weight.detach()
    home = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no float64
    matrix = weight.to(home, torch.float64)
    bias = getattr(module, "bias", None)
    matrix = matrix if isinstance(module, Conv1D) else matrix.T
    return matrix, matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach().to(matrix)


@dataclass(frozen=True)
class Rounding:
    """The ``error`` that rounding in ``dtype`` makes, relative to what it moves, and the most that may be made."""

    dtype: torch.dtype
    error: float
    max_error: float

    def check(self, dtype: torch.dtype) -> None:
        """Raise TwofoldError where a cache in another dtype, into which a model or autocast has come since, would lose more."""
        coarser = torch.finfo(dtype).eps / torch.finfo(self.dtype).eps
        if coarser > 1 and not self.error * coarser <= self.max_error:
            raise TwofoldError(
                f"In {str(dtype).removeprefix('torch.')} rounding in the cache of a halved layer would move its other tensor by {self.error * coarser:.2g} of "
                f"its size, more than max_error = {self.max_error:g}: call twofold.restore(model) and halve it again, in this dtype or with another max_error."
            )


class MultiHeadForward:
    """What the layer does in place of its own forward."""

    def __init__(
        self, layer: Any, family: Family, found: Fold, rotations: KeyRotations | None, rounding: Rounding
    ) -> None:
        self.layer = layer
        self.family = family
        self.kept = found.kept
        self.rotations = rotations
        self.rounding = rounding
        self.heads = num_heads(layer)[0]
        self.sources = self._sources()
        self.map = found.matrix, found.offset
        self.version = self._version()
        self._follow()

    def __call__(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> tuple[Tensor | None, ...]:
        """The layer's own forward, argument by argument, ``key_value_states`` (or ``encoder_hidden_states``) for cross-attention."""
        layer: Any = self.layer
        arguments |= dict(zip(self.family.positional, positional, strict=False))
        given = (arguments.get(name) for name in ("key_value_states", "encoder_hidden_states"))
        source = next((states for states in given if states is not None), None)
        crossing = source is not None
        mask = arguments.get("encoder_attention_mask" if self.family.fused and crossing else self.family.mask)
        self._follow()
        reader = Reader(layer, mask, arguments)
        query, pair = self._query_and_pair(hidden_states, source)
        own = None if self.rotations is None else self.rotations.of_tokens(arguments["position_embeddings"])
        if own is not None:
            query = own.turn(query)
        held, lost = self._held(pair, arguments, own, crossing=crossing)
        reader = replace(reader, bias=self._bias(query, held, arguments))
        if lost is None and query.shape[2] <= head_dim(layer):
            output, weights = self._attend(reader, query, held)
        else:
            lost = self._made(held.stream) if lost is None else lost
            key, value = (held.stream, lost) if self.kept == "keys" else (lost, held.stream)
            output, weights = reader.attend(query, key, value, held.rotation)
        output = getattr(layer, self.family.output)(output.transpose(1, 2).flatten(2))
        return (output, reader.bias, weights) if self.family.hands_on_bias else (output, weights)

    def _bias(self, query: Tensor, held: Held, arguments: dict[str, Any]) -> Tensor | None:
        """What T5 and its like add to the logits of self-attention, [1, H, T, S]: that of an earlier layer, or their own."""
        given: Tensor | None = arguments.get("position_bias")
        if given is not None or not getattr(self.layer, "has_relative_attention_bias", False):
            return given
        lengths = query.shape[2], held.stream.shape[2]
        return self.layer.compute_bias(*lengths, device=query.device, past_seen_tokens=held.seen)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, N] -> [B, H, T, D]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _sources(self) -> tuple[Any, ...]:
        """The modules that make K and V now."""
        return tuple(getattr(self.layer, name) for name in self.family.sources)

    def _follow(self) -> None:
        """Have the map where, and in the dtype in which, the weights are now. Raises TwofoldError where adapters have come between since."""
        if any(now is not then for now, then in zip(self._sources(), self.sources, strict=True)):
            raise TwofoldError(
                f"The projections of {type(self.layer).__name__} have been replaced since it was halved: call twofold.restore(model), merge its adapters, "
                "and halve it again."
            )
        weight = self.sources[0].weight
        check_is_here(weight)
        if not torch.compiler.is_compiling():
            self._check_version()
        if self.map[0].dtype != weight.dtype or self.map[0].device != weight.device:
            with torch.inference_mode(False), torch.no_grad():  # it may be used with gradients later
                self.map = self.map[0].to(weight), self.map[1].to(weight)

    def _version(self) -> list[tuple[int, int]]:
        """Where the numbers in the projections of K and V are, and how many times they have been written since they are there."""
        weights = (weight for source in self.sources for weight in source.parameters(recurse=False))
        return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]

    def _check_version(self) -> None:
        """Raise TwofoldError where the weights were overwritten, of which the map was made; those of a copy, or in another dtype, are the same numbers."""
        now = self._version()
        pairs = zip(now, self.version, strict=True)
        if any(place == former and count > before for (place, count), (former, before) in pairs):
            raise TwofoldError(
                f"The weights of {type(self.layer).__name__} have been written to since it was halved: call twofold.restore(model) and halve it again."
            )
        self.version = now

    def _query_and_pair(
        self, hidden_states: Tensor, source: Tensor | None
    ) -> tuple[Tensor, Callable[[], Sequence[Tensor]]]:
        """Q [B, H, T, D], and what makes K and V of the new tokens: a fused projection has made them already."""
        layer, family = self.layer, self.family
        if family.fused and source is None:
            query, *pair = self._roles(hidden_states)
            return query, lambda: pair
        queries = layer.q_attn if family.fused else getattr(layer, family.projections[0])
        states = hidden_states if source is None else source
        return self._heads(queries(hidden_states)), lambda: self._pair(states)

    def _roles(self, states: Tensor) -> list[Tensor]:
        """Q (where the fused projection has it), K, V."""
        made = getattr(self.layer, self.family.fused)(states)
        if self.family.by_head:
            return list(made.unflatten(2, (self.heads, 3, -1)).transpose(1, 2).unbind(dim=3))
        return [self._heads(part) for part in made.split(self.heads * head_dim(self.layer), dim=2)]

    def _pair(self, states: Tensor) -> Sequence[Tensor]:
        """K and V of some tokens, [B, H, T, D]."""
        if self.family.fused:
            return self._roles(states)[-2:]
        return [self._heads(getattr(self.layer, name)(states)) for name in self.family.sources]

    def _held(
        self, pair: Callable[[], Sequence[Tensor]], arguments: dict[str, Any], own: Rotation | None, *, crossing: bool
    ) -> tuple[Held, Tensor | None]:
        """All tokens' stream, and the other of K and V where it is at hand: where there are no tokens but the new ones."""
        cache, index = cache_of(arguments), self.layer.layer_idx
        whole = cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if crossing else cache.self_attention_cache
            if crossing and whole.is_updated.get(index):
                check_halved(cache, index)
                return Held(cache.layers[index].keys, None, is_new=False), None
        key, value = pair()
        kept, lost = (key, value) if self.kept == "keys" else (value, key)
        if cache is None:
            return Held(kept, own, is_new=True), lost
        self.rounding.check(kept.dtype)
        every, seen = append(cache, kept, index)
        if crossing and isinstance(whole, EncoderDecoderCache):
            whole.is_updated[index] = True
        given = arguments.get("position_ids"), arguments.get("attention_mask")
        held = read(self.layer, (kept, every), seen, self.rotations, own, given)
        return held, lost if held.is_new else None

    def _made(self, stream: Tensor) -> Tensor:
        """The lost one of all tokens [B, H, S, D]: for many queries at once that is less work."""
        matrix, offset = self.map
        return self._heads(stream.transpose(1, 2).flatten(2) @ matrix + offset)

    def _attend(self, reader: Reader, query: Tensor, held: Held) -> tuple[Tensor, Tensor | None]:
        """[B, H, T, D] without the lost one of a single cached token."""
        matrix, offset = self.map
        stream, mixing = held.stream, matrix.unflatten(1, (self.heads, -1)).unflatten(0, (self.heads, -1))
        offset = offset.unflatten(0, (self.heads, 1, -1))
        mask, bias = reader.mask(query, stream.shape[2])
        query = self.layer.scaling * query
        if self.kept == "keys":
            logits = query @ (stream if held.rotation is None else held.rotation.turn(stream)).transpose(-1, -2)
        else:
            rows = torch.einsum("bhte,gdhe->bghtd", query, mixing).flatten(2, 3)
            logits = (rows @ stream.transpose(-1, -2)).sum(dim=1).unflatten(1, (self.heads, -1))
        weights = weights_of(logits if bias is None else logits + bias, mask)
        if self.kept == "values":
            return weights @ stream, weights
        rows = (weights.flatten(1, 2)[:, None] @ stream).unflatten(2, (self.heads, -1))
        output = torch.einsum("bghtd,gdhe->bhte", rows, mixing)
        return output + offset * weights.sum(dim=-1, keepdim=True), weights
