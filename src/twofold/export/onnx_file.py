"""Writing a decoder as an ONNX file, and trying the file before it is called written."""

from __future__ import annotations

import copy
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from twofold._version import __version__
from twofold.cost import cached_bytes_per_token
from twofold.errors import TwofoldError
from twofold.export.decoder import OnnxDecoder
from twofold.export.files import CACHE_FILE, CONFIG_FILE, MODEL_FILE, WEIGHTS_FILE
from twofold.export.graph import DecoderStep
from twofold.export.libraries import onnx_library
from twofold.export.tensors import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    TOKENS,
    TOTAL,
    CachedTensor,
    cache_facts,
    cached_tensors,
)
from twofold.kernels import folded
from twofold.models import TwofoldForCausalLM, TwofoldPreTrainedModel
from twofold.storage import write_json, writing

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"fp32": torch.float32, "fp16": torch.float16})
TOLERANCES: Mapping[str, float] = MappingProxyType({"fp32": 1e-4, "fp16": 2e-2})
"""How far a logit of the file may be from the model's with the same weights in float32, as a share of the largest logit."""
OPSET = 20
MIN_OPSET = 18
MAX_TOKENS = 32768
MAX_INLINE_BYTES = 2_000_000_000
"""A file of protobuf ends at 2 GiB. Weights of more than this go into a file of their own; the rest is for the graph."""
CHECKED_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """What was written. ``largest_difference`` is that of the file's logits from the model's, as a share of the largest logit."""

    folder: Path
    files: Mapping[str, int]
    tie: str
    dtype: str
    opset: int
    max_tokens: int
    cached_tensors: int
    cache_bytes_per_token: int
    largest_difference: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``files`` are names with their bytes."""
        return asdict(self) | {"folder": str(self.folder), "files": dict(self.files)}


def export_onnx(
    model: TwofoldPreTrainedModel,
    folder: str | Path,
    *,
    dtype: str = "fp32",
    opset: int = OPSET,
    max_tokens: int = MAX_TOKENS,
) -> OnnxExport:
    """Write a decoder as ``model.onnx``, with ``config.json`` and the cache's bytes in ``cache.json``, into a folder.

    Inputs and outputs are named in :mod:`twofold.export.tensors`; batch, tokens and past are dynamic, up to ``max_tokens`` in all (no more than
    the model has learned positions). The file is run before it gets its name: texts with padding, whole and token by token, must have the model's
    logits (see :data:`TOLERANCES`). The model itself is left as it is.

    Raises TwofoldError for a model that is no decoder, an unknown dtype or opset, a folder that holds another model, a file that differs from the
    model, and where the extra ``onnx`` is not installed.
    """
    folder = Path(folder)
    _check(model, folder, dtype, opset, max_tokens)
    assert isinstance(model, TwofoldForCausalLM)
    max_tokens = min(max_tokens, model.config.spec.positions.max_positions or max_tokens)
    step = _step(model, DTYPES[dtype], max_tokens)
    graph = _graph(step, opset)
    facts = cache_facts(model.config.spec, dtype=dtype, max_tokens=max_tokens)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as unchecked:
            place = Path(unchecked)
            _save(graph, place / MODEL_FILE)
            config = copy.deepcopy(model.config)
            config.dtype = DTYPES[dtype]
            config.save_pretrained(place)
            write_json(place / CACHE_FILE, facts)
            difference = _largest_difference(step.model, place, dtype)
            files = _move(place, folder)
    return OnnxExport(
        folder=folder,
        files=files,
        tie=str(model.config.spec.tie),
        dtype=dtype,
        opset=opset,
        max_tokens=max_tokens,
        cached_tensors=sum(len(layer) for layer in cached_tensors(model.config.spec)),
        cache_bytes_per_token=cached_bytes_per_token(model.config.spec, dtype),
        largest_difference=difference,
    )


def _check(model: TwofoldPreTrainedModel, folder: Path, dtype: str, opset: int, max_tokens: int) -> None:
    if not isinstance(model, TwofoldForCausalLM):
        raise TwofoldError(
            f"A {model.config.architecture} decodes nothing and has no cache: only a causal_lm can be exported."
        )
    if dtype not in DTYPES:
        raise TwofoldError(f"The dtype {dtype!r} cannot be exported: use one of {', '.join(DTYPES)}.")
    for module in ("onnxscript", "onnxruntime"):
        onnx_library(module, "export a model")
    newest = onnx_library("onnx", "export a model").defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise TwofoldError(f"opset is {opset}, but must be from {MIN_OPSET} to {newest}: {OPSET} is tested.")
    if max_tokens < 1:
        raise TwofoldError(f"max_tokens is {max_tokens}, but it counts the tokens of a text: use at least 1.")
    if (folder / CONFIG_FILE).exists() and not (folder / MODEL_FILE).exists():
        raise TwofoldError(f"{folder} holds another model, whose {CONFIG_FILE} would be replaced: give another folder.")


def _step(model: TwofoldForCausalLM, dtype: torch.dtype, max_tokens: int) -> DecoderStep:
    """A copy of the model, as one step of decoding on the CPU."""
    copied = copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()
    for layer in copied.trunk.layers:
        layer.attention.backend = folded.NAME
    return DecoderStep(copied, max_tokens).eval()


def _graph(step: DecoderStep, opset: int) -> Any:
    """The traced step as a model of onnx_ir."""
    layers = cached_tensors(step.model.config.spec)
    tensors = [tensor for layer in layers for tensor in layer]
    dims: dict[str, Any] = {}

    def dim(name: str) -> Any:
        # One object for one name: then one size is known to be the other, and what follows from it is computed once for all layers.
        return dims.setdefault(name, torch.export.Dim(name))

    shapes = (
        {0: dim(BATCH), 1: dim(TOKENS)},
        {0: dim(BATCH), 1: torch.export.Dim.DYNAMIC},
        tuple(tuple({0: dim(BATCH), 2: dim(tensor.past_axis)} for tensor in layer) for layer in layers),
    )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            step,
            _sample(step, layers),
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            opset_version=opset,
            input_names=[INPUT_IDS, ATTENTION_MASK, *(tensor.input for tensor in tensors)],
            output_names=[LOGITS, *(tensor.output for tensor in tensors)],
            custom_translation_table={torch.ops.aten.cos.default: _cosine},
        )
    assert program is not None
    return _tidied(program.model, tensors, opset)


def _sample(step: DecoderStep, layers: tuple[tuple[CachedTensor, ...], ...]) -> tuple[Any, ...]:
    """Any input at all: sizes of 0 and 1, and sizes that are equal, would be taken for constants and for each other."""
    batch, tokens, past = 2, 3, 7
    dtype = step.model.dtype

    def cached(tensor: CachedTensor) -> Tensor:
        return torch.zeros(batch, tensor.heads, past - 2 if tensor.window_tokens else past, tensor.dim, dtype=dtype)

    return (
        torch.zeros(batch, tokens, dtype=torch.long),
        torch.ones(batch, past + tokens, dtype=torch.long),
        tuple(tuple(map(cached, layer)) for layer in layers),
    )


def _cosine(angles: Any) -> Any:
    """cos x = sin(x + π/2): in float64, where angles are, not every onnxruntime can do the first."""
    onnxscript, onnx = onnx_library("onnxscript", "export a model"), onnx_library("onnx", "export a model")
    if angles.dtype != onnxscript.ir.DataType.DOUBLE:
        return onnxscript.opset18.Cos(angles)
    quarter = onnx.helper.make_tensor("quarter", onnx.TensorProto.DOUBLE, [], [math.pi / 2])
    return onnxscript.opset18.Sin(onnxscript.opset18.Add(angles, onnxscript.opset18.Constant(value=quarter)))


def _tidied(model: Any, tensors: list[CachedTensor], opset: int) -> Any:
    """The model with readable axes, and without what the tracer noted about this machine."""
    if model.opset_imports[""] != opset:
        raise TwofoldError(
            f"This model cannot be written with opset {opset}, only with {model.opset_imports['']}: use {OPSET}."
        )
    ir = onnx_library("onnxscript", "export a model").ir
    axes = {ATTENTION_MASK: {0: BATCH, 1: TOTAL}}
    axes |= {tensor.output: {0: BATCH, 2: tensor.present_axis} for tensor in tensors}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, name in axes.get(value.name, {}).items():
            value.shape[axis] = ir.SymbolicDim(name)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "twofold", __version__
    return model


def _save(model: Any, path: Path) -> None:
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir = onnx_library("onnxscript", "export a model").ir
    ir.save(model, path, external_data=WEIGHTS_FILE if weights > MAX_INLINE_BYTES else None)


def _largest_difference(model: TwofoldForCausalLM, folder: Path, dtype: str) -> float:
    """Of the file's logits from the model's. Raises TwofoldError where it is more than can be."""
    decoder = OnnxDecoder(folder)
    count = min(CHECKED_TOKENS, decoder.max_tokens)
    tokens = torch.randint(decoder.spec.vocab_size, (2, count), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, : count // 3] = 0
    with torch.no_grad():
        wanted = model.float()(tokens, attention_mask=mask, use_cache=False).logits
    found, ends = [], sorted({max(1, count // 2), *range(count - 3, count + 1)} - set(range(-3, 1)))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        found.append(torch.from_numpy(decoder(tokens[:, start:end].numpy(), mask[:, :end].numpy())))
    difference = (torch.cat(found, dim=1) - wanted)[mask.bool()].abs().max() / wanted.abs().max().clamp(min=1e-30)
    if not difference <= TOLERANCES[dtype]:
        raise TwofoldError(
            f"The exported file's logits differ from the model's by {float(difference):.1e} of the largest, and nothing was written: "
            f"more than {TOLERANCES[dtype]:g} is an error of the export, please report it."
        )
    return float(difference)


def _move(place: Path, folder: Path) -> dict[str, int]:
    """Give the files their names, the graph last; the bytes of each."""
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    names = sorted((path.name for path in place.iterdir()), key=lambda name: (name == MODEL_FILE, name))
    for name in names:
        (place / name).replace(folder / name)
    return {name: (folder / name).stat().st_size for name in reversed(names)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block the tracer does not tell what of its own it will change, and which libraries it could do with."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Some onnxscript prints what it has simplified, where --json is to be alone.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
