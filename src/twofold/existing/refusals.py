"""What cannot be halved as it stands, whatever its layers are: found before anything is looked at, and said in one sentence.

Some of it could be made to work and would be wrong without a word: weights that are elsewhere, or in another form than numbers, or a cache that adapters
fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.existing.reading import IMPLEMENTATIONS

PLAIN = (nn.Linear, Conv1D)
"""The projections whose weights are numbers; those of quantizers and adapters are other classes, or hold other tensors."""


def check_model(model: nn.Module) -> None:
    """Raise TwofoldError for a model in training, with adapters, or whose weights are not all here."""
    name = type(model).__name__
    if model.training:
        raise TwofoldError(f"This {name} is in training: halving serves inference, so call model.eval() first.")
    for module in model.modules():
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            raise TwofoldError(f"This {name} carries adapters that are not merged: call merge_and_unload() first.")
        if str(getattr(module, "peft_type", "")).endswith("PREFIX_TUNING"):
            raise TwofoldError(
                f"This {name} has tuned prefixes, which are keys and values in its cache: halve the model without them."
            )
    for parameter_name, parameter in model.named_parameters():
        _check_is_here(model, parameter_name, parameter)


def _check_is_here(model: nn.Module, parameter_name: str, parameter: Tensor) -> None:
    where = f"{parameter_name} of this {type(model).__name__}"
    if parameter.is_meta:
        owner = model.get_submodule(parameter_name.rpartition(".")[0])
        if hasattr(owner, "_hf_hook"):
            raise TwofoldError(
                f"{where} is offloaded, and is here only while its layer computes: load the model with a device_map that keeps all of it on devices."
            )
        raise TwofoldError(f"{where} is on the meta device and holds no numbers: load its weights first.")
    if hasattr(parameter, "placements"):
        raise TwofoldError(
            f"{where} is split over devices: halve each model as a whole, without tensor parallelism or sharding."
        )


def why_no_numbers(projection: nn.Module) -> str:
    """Why the weights of a projection are not plain numbers; empty: they are."""
    weight: Any = getattr(projection, "weight", None)
    held = type(projection) if type(projection) not in PLAIN else type(weight)
    if held not in (*PLAIN, Tensor, nn.Parameter) or not weight.is_floating_point():
        return (
            f"its projections are held as {held.__name__}, of which there is no inverse: load the model without quantization, call "
            "model.dequantize(), or merge its adapters"
        )
    return ""


def why_strange(layer: nn.Module, known: Iterable[str]) -> str:
    """What a layer has that those of its class in Transformers have not, as code of a model's own may; empty: nothing."""
    parts = (name for name, part in layer.named_children() if name not in known and not isinstance(part, nn.Dropout))
    part = next(parts, "")
    return f"it has a {part}, which is not known here" if part else ""


def check_layer(layer: Any) -> None:
    """Raise TwofoldError, the end of a sentence, where masks are not understood, or projections hold numbers of several types."""
    implementation = layer.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise TwofoldError(
            f"the masks of attn_implementation={implementation!r} are not understood: call model.set_attn_implementation with "
            f"{' or '.join(map(repr, IMPLEMENTATIONS))}"
        )
    dtypes = dict(_dtypes(layer))
    if len(set(dtypes.values())) > 1:
        said = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise TwofoldError(
            f"its projections hold numbers of several types ({said}): give them one with model.to(dtype)"
        )


def _dtypes(layer: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    for name, projection in layer.named_children():
        if type(projection) in PLAIN and not why_no_numbers(projection):
            weight: Any = projection.weight
            yield name, weight.dtype
