"""What a model costs, counted from its spec alone: parameters, cached floats and bytes, floating-point operations.

Every count is exact and agrees with the thing itself: ``parameters(spec)`` with the sum of ``p.numel()`` over the real model,
``cache_bytes(spec, ...)`` with the bytes that the real cache holds. Letters: C hidden_size, H query heads, G KV heads, D head_dim,
R free projections, S keys, L latent_dim; d_r is the length of a shared rotary key (``positions.key_extension_dim``), 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

from twofold.cache_spec import CacheSpec, specs_of_layers
from twofold.errors import TwofoldError
from twofold.spec import AttentionSpec, ModelSpec

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1})


def dtype_bytes(dtype: str) -> int:
    """Bytes of one float. Raises TwofoldError for a dtype that is not in :data:`DTYPE_BYTES`."""
    if dtype not in DTYPE_BYTES:
        raise TwofoldError(f"The dtype {dtype!r} is not known: use one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


# Parameters


def attention_parameters(spec: AttentionSpec) -> int:
    """Learned numbers of one attention layer.

    C·D for each head of each free projection (H heads of Q, G of K and V) and H·D·C for the output, each with its bias where
    ``use_bias``; to which come what the scheme of positions learns (shared rotary: a query part of d_r per head and one key part;
    relative bias: buckets × H), the 2 scales of D of QK-norm, and the m weights and one bias of the 2-D positions of ``+``.
    With a latent K and V have L·D for each of H heads and no bias, and the latent has C·L, its bias, and L scales of its norm.
    """
    matrices = _attention_matrices(spec)
    biases = sum(columns for _, columns in _biased_matrices(spec)) if spec.use_bias else 0
    return sum(rows * columns for rows, columns in matrices) + biases + _attention_vectors(spec)


def _attention_matrices(spec: AttentionSpec) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear map of the layer."""
    from_latent = (spec.latent_dim, spec.columns_of("K"))
    return _biased_matrices(spec) + [from_latent] * (2 if spec.latent_dim else 0)


def _biased_matrices(spec: AttentionSpec) -> list[tuple[int, int]]:
    """Those that have a bias where ``use_bias``."""
    width, extension = spec.hidden_size, spec.positions.key_extension_dim
    roles = ("Q",) if spec.latent_dim else spec.tie.free_projections
    matrices = [(width, spec.columns_of(role)) for role in roles]
    if spec.latent_dim:
        matrices.append((width, spec.latent_dim))
    if extension:
        matrices += [(width, spec.num_attention_heads * extension), (width, extension)]
    return [*matrices, (spec.num_attention_heads * spec.head_dim, width)]


def _attention_vectors(spec: AttentionSpec) -> int:
    """Learned numbers of the layer that are not part of a linear map."""
    numbers = spec.query_dim + spec.head_dim if spec.qk_norm else 0
    if spec.tie.plus:
        numbers += spec.plus_channels + 1
    return numbers + spec.latent_dim + spec.positions.num_bias_buckets * spec.num_attention_heads


def parameters(spec: ModelSpec) -> int:
    """Learned numbers of the whole model, a matrix that is used twice (``tie_word_embeddings``) counted once.

    Per layer: attention, two norms, and the MLP's 2 (gated: 3) matrices of C × intermediate_size; around them the embedding of the
    input, learned positions, the class token of an image classifier, the last norm, and the head.
    """
    norm = spec.hidden_size * (2 if spec.norm == "layernorm" else 1)
    layers = sum(attention_parameters(attention) + 2 * norm for attention in _layers(spec))
    matrices = _mlp_matrices(spec)
    mlp = sum(rows * columns + (columns if spec.use_bias else 0) for rows, columns in matrices)
    return layers + spec.num_hidden_layers * mlp + norm + _embedding_parameters(spec) + _head_parameters(spec)


def _layers(spec: ModelSpec) -> Iterator[AttentionSpec]:
    return (spec.attention(index) for index in range(spec.num_hidden_layers))


def _mlp_matrices(spec: ModelSpec) -> list[tuple[int, int]]:
    inner = (spec.hidden_size, spec.intermediate_size)
    return [inner] * (2 if spec.gated_mlp else 1) + [inner[::-1]]


def _embedding_parameters(spec: ModelSpec) -> int:
    numbers = spec.positions.max_positions * spec.hidden_size + spec.vocab_size * spec.hidden_size
    if spec.feature_size:
        numbers += (spec.feature_size + 1) * spec.hidden_size
    if spec.architecture == "image_classification":
        numbers += (spec.num_channels * spec.patch_size**2 + 1) * spec.hidden_size + spec.hidden_size
    return numbers


def _head_parameters(spec: ModelSpec) -> int:
    if spec.architecture != "causal_lm":
        return (spec.hidden_size + 1) * spec.num_labels
    return 0 if spec.tie_word_embeddings else spec.hidden_size * spec.vocab_size


# The cache


def cached_streams(spec: AttentionSpec) -> list[tuple[int, int]]:
    """(heads, floats of a head) of every tensor that decoding keeps: the basis of K and V or their latent, and the shared rotary key."""
    streams = [(spec.num_key_value_heads, spec.head_dim)] * spec.tie.cached_tensors
    streams = [(1, spec.latent_dim)] if spec.latent_dim else streams
    extension = spec.positions.key_extension_dim
    return [*streams, (1, extension)] if extension else streams


def cached_floats_per_layer(spec: AttentionSpec) -> int:
    """Floats that decoding keeps per token in one layer: (rank of the K and V rows)·G·D + d_r, or L + d_r."""
    return sum(heads * dim for heads, dim in cached_streams(spec))


def cached_floats_per_token(spec: ModelSpec) -> int:
    """Floats that decoding keeps per token over all layers. For a model that is not causal: what it would keep if it were."""
    return sum(cached_floats_per_layer(attention) for attention in _layers(spec))


def mean_cached_floats_per_token(spec: ModelSpec, context: int) -> float:
    """Floats that the cache of a text of ``context`` tokens holds, over its tokens: :func:`cached_floats_per_token`, but for windows, which forget.

    Raises TwofoldError for a context below 1.
    """
    _require_context(context)
    return sum(cached_floats_per_layer(layer) * _visible(layer, context) for layer in _layers(spec)) / context


def cached_bytes_per_token(spec: ModelSpec, dtype: str = "bf16") -> int:
    """:func:`cached_floats_per_token` in bytes. Raises TwofoldError for an unknown dtype."""
    return cached_floats_per_token(spec) * dtype_bytes(dtype)


def cache_bytes(
    spec: ModelSpec,
    tokens: int,
    dtype: str = "bf16",
    batch: int = 1,
    cache: CacheSpec | tuple[CacheSpec, ...] = CacheSpec(),  # noqa: B008 (frozen)
) -> int:
    """Bytes of the cache of ``batch`` sequences of ``tokens`` each, held as ``cache`` says (for every layer, or one for each).

    A layer with a window keeps no more tokens than it may see; one with pre-allocated room takes all of it at once. Quantized, a token of a
    head costs D · bits / 8 bytes, and a scale and a zero point of the dtype for each group; with one scale for a head it is of float32, and there
    is no zero point. Raises TwofoldError for what cannot be held.
    """
    if tokens < 0 or batch < 1:
        raise TwofoldError(f"A cache holds 0 or more tokens of at least 1 sequence, not {tokens} of {batch}.")
    width = dtype_bytes(dtype)
    layers = zip(_layers(spec), specs_of_layers(spec.num_hidden_layers, cache), strict=True)
    return batch * sum(_layer_bytes(attention, tokens, width, held) for attention, held in layers)


def _layer_bytes(spec: AttentionSpec, tokens: int, width: int, cache: CacheSpec) -> int:
    if cache.max_tokens and tokens > cache.max_tokens:
        raise TwofoldError(f"A cache with room for {cache.max_tokens} tokens cannot hold {tokens}.")
    kept = _visible(spec, cache.max_tokens or tokens)
    old = cache.quantized_tokens(kept)
    saved = sum(
        heads * (old * dim * width - quantized_bytes(dim, old, width, cache))
        for heads, dim in quantized_streams(spec, cache)
    )
    return kept * cached_floats_per_layer(spec) * width - saved


def quantized_streams(spec: AttentionSpec, cache: CacheSpec) -> list[tuple[int, int]]:
    """Those of :func:`cached_streams` that are held in few bits: none of a window, and a shared rotary key is never codes that kernels read."""
    if not cache.quantizes(spec.window_tokens):
        return []
    streams = cached_streams(spec)
    is_whole = cache.axis == "head" and spec.positions.key_extension_dim
    return streams[:-1] if is_whole else streams


def quantized_bytes(dim: int, tokens: int, width: int, cache: CacheSpec) -> int:
    """Codes of one head, and a scale and a zero point of each group; a scale in float32 where the group is the head."""
    if cache.axis == "head":
        return tokens * (dim + DTYPE_BYTES["fp32"])
    group = cache.group(dim)
    groups = tokens * (dim // group) if cache.axis == "token" else tokens // cache.group_size * dim
    return tokens * dim * cache.bits // 8 + 2 * groups * width


def _visible(spec: AttentionSpec, tokens: int) -> int:
    return min(tokens, spec.window_tokens) if spec.window_tokens else tokens


# Floating-point operations


def training_flops_per_token(spec: ModelSpec, context: int) -> float:
    """Operations of one training step per token, in sequences of ``context`` tokens.

    6 for each weight of each linear map (2 forward, 4 backward), and 6·H·(2D + d_r) for each key a query sees; on average a
    causal layer sees (context + 1) / 2 keys, one with a window of w min(i, w) at position i. Sums without weights (norms, softmax, the
    combination of projections into a derived role) are not counted.
    """
    _require_context(context)
    weights = sum(rows * columns for rows, columns in _matrices(spec)) + _outer_weights_per_token(spec, context)
    keys = partial(_mean_visible, context=context)
    return 3.0 * (2 * weights + _attention_flops(spec, keys, lambda layer: layer.query_dim + layer.head_dim))


def decode_flops_per_token(spec: ModelSpec, context: int) -> float:
    """Operations to produce the token at position ``context`` (counted from 1) from a cache of all tokens before it.

    2 for each weight of each linear map and 2·H·(2D + d_r) for each key in sight, with a latent 2·H·(2L + d_r): it is read as it is cached.
    Raises TwofoldError for a model that is not causal.
    """
    _require_context(context)
    if not spec.causal:
        raise TwofoldError("Only a causal model decodes token by token; this one is not causal.")
    weights = sum(rows * columns for rows, columns in _matrices(spec)) + _outer_weights_per_token(spec, 1)
    keys = partial(_visible, tokens=context)
    return 2.0 * weights + _attention_flops(
        spec, keys, lambda layer: 2 * layer.latent_dim or layer.query_dim + layer.head_dim
    )


def _matrices(spec: ModelSpec) -> Iterator[tuple[int, int]]:
    """Every linear map that all tokens pass, the head left out; looking up an embedding is not a product."""
    for attention in _layers(spec):
        yield from _attention_matrices(attention)
        yield from _mlp_matrices(spec)
    if spec.feature_size:
        yield spec.feature_size, spec.hidden_size


def _outer_weights_per_token(spec: ModelSpec, context: int) -> float:
    """The head's weights; of an image classifier's tokens one is read by the head, and the others come out of the map of patches."""
    if spec.architecture == "image_classification":
        patch = spec.num_channels * spec.patch_size**2 * spec.hidden_size
        return (spec.hidden_size * spec.num_labels + patch * (context - 1)) / context
    return spec.hidden_size * (spec.num_labels if spec.architecture == "token_classification" else spec.vocab_size)


def _attention_flops(
    spec: ModelSpec, keys: Callable[[AttentionSpec], float], dims: Callable[[AttentionSpec], int]
) -> float:
    """Products of queries with keys and of weights with values, forward, per token; ``dims`` are those of a key and a value together."""
    return sum(
        2.0 * layer.num_attention_heads * (dims(layer) + layer.positions.key_extension_dim) * keys(layer)
        for layer in _layers(spec)
    )


def _mean_visible(spec: AttentionSpec, context: int) -> float:
    """Keys in sight, averaged over the positions of a sequence."""
    if spec.causal:
        window = _visible(spec, context)
        return (window * (window + 1) / 2 + (context - window) * window) / context
    if not spec.window_tokens:
        return float(context)
    return sum(_visible_both_ways(position, spec.window_tokens, context) for position in range(context)) / context


def _visible_both_ways(position: int, window: int, context: int) -> int:
    return min(position + window, context) - max(position - window + 1, 0)


def _require_context(context: int) -> None:
    if context < 1:
        raise TwofoldError(f"context is {context}, but it counts tokens: use at least 1.")
