"""A Transformers model, built without memory and asked what its own cache holds.

On torch's meta device tensors have shapes and no numbers, so a model of any size is built in about a second: its parameters are counted
one by one, and two tokens are passed through it, after which its cache shows the shape of all that it keeps. That is compared with the
reading of the configuration (:mod:`twofold.estimate.fields`); where the two differ, the running cache is right.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from twofold.errors import TwofoldError
from twofold.estimate.fields import ALIASES, GATE_BYTES, Fields, kv_heads, read_layers
from twofold.estimate.layers import CachedTensor, LayerCache

BATCH, TOKENS = 2, 2
# Implementations that look into numbers as they run cannot do so where there are none.
ATTENTION, EXPERTS = "eager", "batched_mm"
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHE_FIELDS = ("cache", "past_key_values", "cache_params")
"""Names under which models of different releases give their cache back."""
WHOLE_LAYERS = ("DynamicLayer", "DynamicIndexedLayer", "LinearAttentionAndFullAttentionLayer")
WINDOW_LAYERS = ("DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
STATE_LAYERS = ("LinearAttentionLayer",)
EMPTY_LAYERS = ("DummyLayer",)
COUNTED_FROM_FIELDS = ("DeepseekV4HCACache", "DeepseekV4CSACache")
"""Layers whose entries come once in many tokens: two tokens say nothing of them."""

READ_TYPES = ("jetmoe",)
"""Models that look into numbers as they run, and whose configuration was found to say what a running cache holds."""

LayerShapes = tuple[LayerCache | None, ...]


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """``name`` is the class, and ``parameters`` counts a shared matrix once.

    ``layers`` is what the cache holds, ``read`` what the configuration says (empty: it does not settle it), and ``notes`` are sentences about
    how this was found out.
    """

    name: str
    parameters: int
    layers: tuple[LayerCache, ...]
    read: tuple[LayerCache, ...]
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def inspect(path: Path, dtype: str = "bf16") -> EngineModel:
    """The model of a ``config.json`` or of a folder that holds one. Raises TwofoldError, one sentence, where it has no cache to count."""
    with _quietly():
        config = _config(path)
        fields = _fields(config)
        if config.is_encoder_decoder:
            read_layers(fields)  # says why not
        kind = DTYPES.get(dtype, torch.bfloat16)  # nothing is computed in 8 bits
        model, is_whole = _build(config, kind)
        fields |= _widths(model)
        read, unreadable = _read(fields)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        held, silence = _ask(model, config, kind)
    notes = []
    if not is_whole:
        notes.append(
            f"The parameters are those of the text model, {type(model).__name__}: the whole could not be built here."
        )
    if held is None:
        if read is None:
            raise TwofoldError(unreadable)
        if fields.get("model_type") not in READ_TYPES:
            raise TwofoldError(
                f"{type(model).__name__} cannot be asked without memory what its cache holds ({silence}), and its configuration alone might mislead."
            )
        notes.append(f"Read from the configuration alone: the model could not be asked without memory ({silence}).")
        layers = read
    else:
        layers = _agreed(read, held, unreadable)
    notes += _remarks(fields, layers)
    return EngineModel(
        name=type(model).__name__,
        parameters=parameters,
        layers=layers,
        read=read or (),
        fields=fields,
        notes=tuple(notes),
    )


def _config(path: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (a model's own configuration class may raise anything)
        kind = _model_type(path)
        known = kind in transformers.CONFIG_MAPPING
        why = (
            f"it describes no {kind} model ({_reason(error)})"
            if known
            else f"{transformers.__version__} knows no model type {kind!r}"
        )
        raise TwofoldError(f"{path} cannot be read by Transformers: {why}.") from None


def _model_type(path: Path) -> str:
    file = path / "config.json" if path.is_dir() else path
    return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields of the decoder, those that are properties or have another name in this model included."""
    text = config.get_text_config(decoder=True)
    values: dict[str, Any] = text.to_dict() | {"is_encoder_decoder": config.is_encoder_decoder}
    for name in (*ALIASES, "layer_types", "sliding_window", "attention_chunk_size"):
        with suppress(Exception):  # Transformers' own, where layers differ in it: to_dict() has said how
            value = getattr(text, name, None)
            if value is not None:
                values[name] = value
    return values


def _widths(model: PreTrainedModel) -> dict[str, Any]:
    """Bytes of DeepSeek-V4's gates, which are added to a bias that some releases of Transformers keep in float32."""
    biases = [bias for name, bias in model.named_parameters() if name.endswith("compressor.position_bias")]
    return {GATE_BYTES: biases[0].element_size()} if biases else {}


def _read(fields: Mapping[str, Any]) -> tuple[tuple[LayerCache, ...] | None, str]:
    try:
        return read_layers(fields), ""
    except TwofoldError as error:
        return None, str(error)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, bool]:
    """The model, and whether it is the whole of it: where images need a package that is not there, the text part alone can be built."""
    reasons = []
    for kind, part in _classes(config):
        part._experts_implementation = EXPERTS
        try:
            with torch.device("meta"):
                return kind(part, dtype=dtype, attn_implementation=ATTENTION).eval(), part is config
        except Exception as error:  # noqa: BLE001 (a model's own code may raise anything)
            reasons.append(_reason(error))
    raise TwofoldError(
        f"Transformers {transformers.__version__} cannot build a {config.model_type} language model: {reasons[0]}."
    )


def _classes(config: PreTrainedConfig) -> Iterator[tuple[Callable[..., PreTrainedModel], PreTrainedConfig]]:
    """Ways to build the model, the best first: the class that wrote the configuration, what Transformers takes for a text generator."""
    named = next(iter(config.architectures or ()), "")
    if named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and hasattr(transformers, named):
        yield getattr(transformers, named)._from_config, config
    yield AutoModelForCausalLM.from_config, config
    yield AutoModelForImageTextToText.from_config, config
    yield AutoModelForCausalLM.from_config, config.get_text_config(decoder=True)


def _reason(error: Exception) -> str:
    """The first line of what an error says, to be put into a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _ask(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[LayerShapes | None, str]:
    """What each layer's cache holds after two tokens; None and the reason where the model cannot run without numbers."""
    held, silence = _run(model)
    text = config.get_text_config(decoder=True)
    if held is None and text is not config:
        try:
            with torch.device("meta"):
                language_model = AutoModelForCausalLM.from_config(
                    text, dtype=dtype, attn_implementation=ATTENTION
                ).eval()
        except Exception:  # noqa: BLE001 (then the first reason stands)
            return None, silence
        held, _ = _run(language_model)
    return held, silence


def _run(model: PreTrainedModel) -> tuple[LayerShapes | None, str]:
    try:
        tokens = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")
        with torch.no_grad():
            output = model(input_ids=tokens, use_cache=True)
    except Exception as error:  # noqa: BLE001 (a model's own code may raise anything)
        return None, _reason(error)
    cache = next((output[field] for field in CACHE_FIELDS if output.get(field) is not None), None)
    name = type(model).__name__
    if cache is None:
        raise TwofoldError(
            f"{name} gives no cache back: it is no decoder, or keeps its state where Transformers does not show it."
        )
    if type(cache).__name__ != "DynamicCache":
        raise TwofoldError(f"{name} has a cache of its own, {type(cache).__name__}, whose contents are not known here.")
    return tuple(_shape(layer, name) for layer in cache.layers), ""


def _shape(layer: Any, model: str) -> LayerCache | None:
    kind = type(layer).__name__
    if kind in COUNTED_FROM_FIELDS:
        return None
    if kind in EMPTY_LAYERS:
        return LayerCache()
    if kind not in (*WHOLE_LAYERS, *WINDOW_LAYERS, *STATE_LAYERS):
        raise TwofoldError(f"{model} has cache layers of its own, {kind}, whose contents are not known here.")
    window = layer.sliding_window if kind in WINDOW_LAYERS else 0
    tensors = []
    for name in ("keys", "values", "indexer_keys"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            shape = tensor.shape if tensor.ndim == 4 else tensor[:, None].shape
            wanted = min(TOKENS, window - 1) if window else TOKENS
            if shape[0] != BATCH or shape[2] != wanted:
                raise TwofoldError(
                    f"{model} holds {name} of the shape {list(shape)} for {TOKENS} tokens: they are not one for each token."
                )
            tensors.append(
                CachedTensor(
                    name=name.replace("_", " "),
                    heads=shape[1],
                    dim=shape[3],
                    kept="window" if window else "all",
                    size=window,
                )
            )
    states = [state for name in ("conv_states", "recurrent_states") for state in getattr(layer, name, {}).values()]
    state_bytes = sum(state.numel() * state.element_size() for state in states if state is not None)
    return LayerCache(tensors=tuple(tensors), state_bytes=state_bytes // BATCH)


def _agreed(read: tuple[LayerCache, ...] | None, held: LayerShapes, unreadable: str) -> tuple[LayerCache, ...]:
    """The reading of the configuration where it is what the cache holds, layer by layer, else what the cache holds."""
    if read is None:
        if any(layer is None for layer in held):
            raise TwofoldError(unreadable)
        return tuple(layer for layer in held if layer is not None)
    # Transformers 5.17 leaves out the layers at the end that share others' keys and values.
    padded = (*held, *(LayerCache(),) * (len(read) - len(held)))
    if len(padded) == len(read) and all(seen is None or _same(a, seen) for a, seen in zip(read, padded, strict=True)):
        return read
    if any(layer is None for layer in held):
        raise TwofoldError("The model's cache is not what its configuration says, so it is not counted.")
    return tuple(layer for layer in held if layer is not None)


def _same(read: LayerCache, held: LayerCache) -> bool:
    def shapes(layer: LayerCache) -> list[CachedTensor]:
        return sorted((replace(tensor, name="") for tensor in layer.tensors), key=repr)

    return shapes(read) == shapes(held) and read.state_bytes == held.state_bytes


def _remarks(fields: Mapping[str, Any], layers: tuple[LayerCache, ...]) -> Iterator[str]:
    """What a reader would not expect of these layers."""
    if with_state := [layer for layer in layers if layer.state_bytes]:
        total = sum(layer.state_bytes for layer in with_state)
        yield f"{len(with_state)} of {len(layers)} layers keep a state of fixed size, {total:,} bytes per sequence, which is counted as it is."
    reading = Fields(fields)
    declared = kv_heads(reading) if reading.get("num_attention_heads") else 0
    stored = max((tensor.heads for layer in layers for tensor in layer.tensors if tensor.name == "keys"), default=0)
    if reading.get("new_decoder_architecture") and stored > declared:
        yield f"Transformers stores each of its {declared} KV heads {stored // declared} times over."


@contextmanager
def _quietly() -> Iterator[None]:
    """Within the block neither Transformers nor Python warns: the model is not going to be used."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
