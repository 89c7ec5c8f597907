"""What Transformers' own cache keeps for a model, read from the fields of the model's configuration.

Every layer is of a kind that is known here (full, sliding or chunked attention, DeepSeek's indexed and compressed attention, or no cache at
all), or one sentence says that it is not: a wrong number is worse than none. The fields may come from a ``config.json`` or, with all
defaults filled in, from :mod:`twofold.estimate.engine`, which also asks the running cache whether the reading is right.

Sources: Transformers 5.17 to 5.24, ``cache_utils.py`` and the models' own modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from twofold.errors import TwofoldError
from twofold.estimate.layers import CachedTensor, LayerCache, pair

ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "kv_n_heads"),
    "hidden_size": ("n_embd", "d_model", "dim_model"),
    "head_dim": ("attention_head_dim", "dim_head"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
}
"""Other names that older models give to the same field."""

NESTED = ("text_config", "decoder", "generator", "llm_config")
WHOLE = ("full_attention", "attention", "noncausal_full_attention")
WINDOWED: Mapping[str, str] = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
INDEXED = ("indexed_attention", "deepseek_sparse_attention")
COMPRESSED = ("heavily_compressed_attention", "compressed_sparse_attention")
GATE_BYTES = "compressor_gate_bytes"
"""No field of a configuration: what the engine knows of the width of DeepSeek-V4's gates."""
LATENT: Mapping[str, str] = {"latent": "kv_lora_rank", "rotary key": "qk_rope_head_dim"}
WITHOUT_CACHE = ("moe", "mlp", "dummy")
STATES = ("linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "recurrent")
# Where a configuration names no kinds of layers, these fields say that some of them are no attention.
STATE_FIELDS = ("attn_layer_period", "hybrid_override_pattern", "ssm_cfg", "state_size", "block_types", "mamba_d_conv")


class Fields:
    """The fields of one model's decoder, whatever its configuration calls them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name in NESTED:
            if isinstance(nested := values.get(name), Mapping) and nested:
                values = {"model_type": values.get("model_type")} | dict(nested)
                break
        self.values = values

    def get(self, name: str) -> Any:
        """The value under its name or an older one; None where there is none."""
        for candidate in (name, *ALIASES.get(name, ())):
            if (value := self.values.get(candidate)) is not None:
                return value
        return None

    def number(self, name: str) -> int:
        """A whole number of at least 1. Raises TwofoldError for anything else."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            said = "does not say" if value is None else f"has {value!r} for"
            raise TwofoldError(f"The configuration {said} {name}, a whole number, so its cache cannot be counted.")
        return value

    def layer(self, index: int, kind: str) -> Fields:
        """The fields as one layer sees them."""
        overrides = self.get("per_layer_config")
        if isinstance(overrides, Mapping):
            own = {int(place): fields for place, fields in overrides.items()}.get(index)  # written as "05"
        else:
            own = self._global_heads() if kind == "full_attention" else None
        return Fields({**self.values, **own}) if isinstance(own, Mapping) else self

    def _global_heads(self) -> dict[str, Any]:
        """Gemma 4, before layers had configurations of their own."""
        names = {"global_head_dim": "head_dim"}
        if self.get("attention_k_eq_v"):
            names["num_global_key_value_heads"] = "num_key_value_heads"
        return {ours: self.get(theirs) for theirs, ours in names.items() if self.get(theirs)}


def read_layers(values: Mapping[str, Any]) -> tuple[LayerCache, ...]:
    """The cache of each layer. Raises TwofoldError, one sentence, where the configuration does not settle it."""
    if values.get("is_encoder_decoder"):
        raise TwofoldError(
            "The model is an encoder and a decoder, whose cache also holds what the encoder said: it is not counted here."
        )
    fields = Fields(values)
    kinds = layer_kinds(fields)
    shared = fields.get("num_kv_shared_layers") or 0
    if shared:
        kinds[len(kinds) - shared :] = ["dummy"] * shared
    return tuple(_layer(fields.layer(index, kind), kind) for index, kind in enumerate(kinds))


def layer_kinds(fields: Fields) -> list[str]:
    """The kind of each layer, under Transformers' names. Raises TwofoldError for kinds whose cache is not known here."""
    count = fields.number("num_hidden_layers")
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = _inferred_kinds(fields, count)
    if not isinstance(kinds, Sequence) or len(kinds) != count:
        raise TwofoldError(f"The configuration names the kinds of {len(kinds)} layers, but has {count}.")
    known = (*WHOLE, *WINDOWED, *INDEXED, *COMPRESSED, *WITHOUT_CACHE)
    for index, kind in enumerate(kinds):
        if kind in STATES:
            raise TwofoldError(
                f"Layer {index} is a {kind} layer: the size of the state that it keeps cannot be read from the configuration."
            )
        if kind not in known:
            raise TwofoldError(
                f"Layer {index} is of the kind {kind!r}, whose cache is not known here: no number is better than a wrong one."
            )
    return list(kinds)


def _inferred_kinds(fields: Fields, count: int) -> list[str]:
    """Transformers' own rules for a configuration that names no kinds."""
    if state := next((name for name in STATE_FIELDS if fields.get(name)), ""):
        raise TwofoldError(
            f"The configuration has a {state}, so some layers are no attention, and it does not say which: they cannot be counted."
        )
    if fields.get("attention_chunk_size"):
        return ["chunked_attention"] * count
    if not fields.get("sliding_window") or fields.get("use_sliding_window") is False:
        return ["full_attention"] * count
    if pattern := fields.get("sliding_window_pattern"):  # Gemma 2 and 3: every so many layers one sees everything
        return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]
    first = (
        fields.get("max_window_layers") if fields.get("use_sliding_window") else 0
    )  # Qwen 2: the first ones see everything
    return ["full_attention" if index < (first or 0) else "sliding_attention" for index in range(count)]


def _layer(fields: Fields, kind: str) -> LayerCache:
    if kind in WITHOUT_CACHE:
        return LayerCache()
    if kind in COMPRESSED:
        return _compressed(fields, kind)
    window = fields.number(WINDOWED[kind]) if kind in WINDOWED else 0
    if fields.get("kv_lora_rank"):
        tensors = _latent(fields, window)
    else:
        heads, dim = stored_heads(fields), head_dim(fields)
        tensors = pair(heads, dim, fields.get("v_head_dim") or 0, window_tokens=window)
    if kind in INDEXED:
        tensors += (CachedTensor(name="indexer keys", heads=1, dim=fields.number("index_head_dim")),)
    # DeepSeek-V4's one projection is key and value in every layer; its plain windows keep it twice nonetheless.
    is_one = fields.get("model_type") == "deepseek_v4" or (bool(fields.get("attention_k_eq_v")) and kind in WHOLE)
    return LayerCache(tensors=tensors, is_one=is_one)


def _latent(fields: Fields, window: int) -> tuple[CachedTensor, ...]:
    """MLA keeps the compressed row of all heads, and one rotary key: each once per token."""
    return tuple(
        CachedTensor(name=name, heads=1, dim=fields.number(field), kept="window" if window else "all", size=window)
        for name, field in LATENT.items()
    )


def expanded(values: Mapping[str, Any], layers: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """An MLA model's layers with keys and values of all heads in place of the latent; empty where no layer has one."""
    if not any(tensor.name == "latent" for layer in layers for tensor in layer.tensors):
        return ()
    fields = Fields(values)
    heads = fields.number("num_attention_heads")
    width = fields.number("qk_nope_head_dim") + fields.number("qk_rope_head_dim")
    value_width = fields.number("v_head_dim")

    def of_all_heads(layer: LayerCache) -> LayerCache:
        latent = [tensor for tensor in layer.tensors if tensor.name in LATENT]
        if not latent:
            return layer
        others = tuple(tensor for tensor in layer.tensors if tensor not in latent)
        return replace(layer, tensors=(*pair(heads, width, value_width, window_tokens=latent[0].size), *others))

    return tuple(map(of_all_heads, layers))


def stored_heads(fields: Fields) -> int:
    """KV heads as the engine stores them."""
    heads = fields.number("num_attention_heads")
    if fields.get(
        "new_decoder_architecture"
    ):  # Falcon 40B and 180B: each KV head is repeated for its queries, then stored
        return heads
    if fields.get("multi_query"):  # Falcon 7B, StarCoder
        return 1
    return kv_heads(fields)


def kv_heads(fields: Fields) -> int:
    """KV heads that the model has."""
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        return 1
    return (
        fields.number("num_key_value_heads")
        if fields.get("num_key_value_heads")
        else fields.number("num_attention_heads")
    )


def head_dim(fields: Fields) -> int:
    """Width of a head: as said, or the model's width over its heads."""
    if fields.get("head_dim"):
        return fields.number("head_dim")
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    return width // heads


def _compressed(fields: Fields, kind: str) -> LayerCache:
    """DeepSeek-V4: one tensor in a window, and one entry for each block of tokens; what makes up the next entry waits beside them.

    The sparse kind makes an entry of two blocks, so both its waiting rows are twice as wide and the last block's half is kept too (its
    gates in float32, unless the model says otherwise); and it has a second, narrower series of entries for the indexer.
    """
    rates = fields.get("compress_rates")
    rate = rates.get(kind) if isinstance(rates, Mapping) else None
    if not isinstance(rate, int) or rate < 1:
        raise TwofoldError(
            f"The configuration does not say how many tokens {kind} makes one entry of (compress_rates)."
        )
    window, dim = fields.number("sliding_window"), head_dim(fields)
    tensors = [CachedTensor(name="keys and values", heads=1, dim=dim, kept="window", size=window)]
    is_sparse = kind == "compressed_sparse_attention"
    series = {"compressor": dim} | ({"indexer": fields.number("index_head_dim")} if is_sparse else {})
    for name, width in series.items():
        tensors.append(CachedTensor(name=f"{name} entries", heads=1, dim=width, kept="compressed", size=rate))
        waiting = 2 * width if is_sparse else width
        tensors += [
            CachedTensor(name=f"{name} {part}", heads=1, dim=waiting, kept="unfinished", size=rate)
            for part in ("rows", "gates")
        ]
        if is_sparse:
            rows = CachedTensor(name=f"{name} last rows", heads=1, dim=width, kept="last block", size=rate)
            tensors += [rows, replace(rows, name=f"{name} last gates", float_bytes=fields.get(GATE_BYTES) or 4)]
    return LayerCache(tensors=tuple(tensors), is_one=True)


def position_limit(values: Mapping[str, Any]) -> int:
    """The longest text that the model has positions for; 0 where the configuration sets no end."""
    limit = Fields(values).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else 0
