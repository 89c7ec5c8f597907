"""A trained model from its folder, or one sentence that says what is wrong with the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from twofold.errors import TwofoldError
from twofold.models.causal_lm import TwofoldForCausalLM
from twofold.models.classification import TwofoldForTokenClassification
from twofold.models.configuration import TwofoldConfig
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.vision import TwofoldForImageClassification

MODELS: Mapping[str, type[TwofoldPreTrainedModel]] = {
    model.architecture: model
    for model in (TwofoldForCausalLM, TwofoldForTokenClassification, TwofoldForImageClassification)
}
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_model(path: str | Path, *, backend: str = "auto", **options: Any) -> TwofoldPreTrainedModel:
    """The model that ``save_pretrained`` wrote into a folder, of whichever architecture its configuration names, in evaluation mode.

    ``options`` are those of Transformers' ``from_pretrained`` (``dtype``, ``device_map`` ...). Only safetensors are read: a pickle can run
    any code. Raises TwofoldError where the folder, its configuration or its weights are missing, truncated, or do not fit one another.
    """
    folder = Path(path)
    config = _config(folder)
    kind = MODELS[config.architecture]
    found = dict(tensor_shapes(folder))
    with torch.device("meta"):
        model = kind(config)
    _compare(
        folder,
        found,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        set(model.all_tied_weights_keys),
    )
    return kind.from_pretrained(folder, backend=backend, use_safetensors=True, local_files_only=True, **options)


def _config(folder: Path) -> TwofoldConfig:
    if not folder.is_dir():
        raise TwofoldError(f"There is no model in {folder}: it is not a folder.")
    if not (folder / "config.json").is_file():
        raise TwofoldError(f"There is no model in {folder}: it holds no config.json.")
    values = _json(folder / "config.json")
    if values.get("model_type") != TwofoldConfig.model_type:
        raise TwofoldError(
            f"{folder / 'config.json'} is of the model type {values.get('model_type')!r}, not of {TwofoldConfig.model_type!r}."
        )
    try:
        return TwofoldConfig.from_pretrained(folder, local_files_only=True)
    except TwofoldError as error:
        raise TwofoldError(f"{folder / 'config.json'} describes no model. {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwofoldError(
            f"{path} cannot be read as JSON ({error}): the checkpoint is damaged, take another one."
        ) from None
    if not isinstance(values, dict):
        raise TwofoldError(f"{path} holds no fields: the checkpoint is damaged, take another one.")
    return values


def tensor_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor in the folder, from the files' headers alone. Raises TwofoldError for a file that is no whole safetensors file."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                yield from [(name, tuple(file.get_slice(name).get_shape())) for name in names]
        except (OSError, SafetensorError) as error:
            raise TwofoldError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or damaged, take another one."
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold a folder's weights. Raises TwofoldError where there are none, or not all; pickles are not read."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _parts(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise TwofoldError(
            f"{folder / pickles[0]} is a pickle, which can run any code when it is read: convert it to {WEIGHTS} first."
        )
    raise TwofoldError(f"There are no weights in {folder}: it holds no {WEIGHTS}.")


def _parts(folder: Path) -> list[Path]:
    """The files that an index names."""
    parts = _json(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise TwofoldError(f"{folder / INDEX} names no files: the checkpoint is damaged, take another one.")
    names = sorted({str(name) for name in parts.values()})
    for name in names:
        if not (folder / name).is_file():
            raise TwofoldError(
                f"{folder} lacks {name}, which its index names: the checkpoint is not whole, take another one."
            )
    return [folder / name for name in names]


def _compare(
    folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], tied: set[str]
) -> None:
    for name in sorted(wanted.keys() - found.keys() - tied):
        raise TwofoldError(
            f"The weights in {folder} lack {name}, which config.json asks for: the two do not belong together."
        )
    for name in sorted(found.keys() - wanted.keys()):
        raise TwofoldError(
            f"The weights in {folder} hold {name}, which config.json does not ask for: the two do not belong together."
        )
    for name in sorted(found):
        if found[name] != wanted[name]:
            raise TwofoldError(
                f"{name} has the shape {list(found[name])} in the weights of {folder}, but config.json asks for {list(wanted[name])}: "
                "the two do not belong together."
            )
