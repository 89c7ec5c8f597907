"""What an exported folder holds, and what it says about itself."""

from __future__ import annotations

from pathlib import Path

from twofold.errors import TwofoldError
from twofold.models import TwofoldConfig
from twofold.storage import read_json

MODEL_FILE = "model.onnx"
"""The graph, and the weights unless they are too large for one file."""
WEIGHTS_FILE = f"{MODEL_FILE}.data"
"""The weights, where they are."""
CONFIG_FILE = "config.json"
"""The model's configuration, as Transformers writes it: the tie is in it."""
CACHE_FILE = "cache.json"
"""The cached tensors and their bytes: :func:`~twofold.export.tensors.cache_facts`."""


def read_config(folder: Path) -> TwofoldConfig:
    """The configuration of an exported model. Raises TwofoldError where there is none, or a damaged one."""
    if read_json(folder / CONFIG_FILE).get("model_type") != TwofoldConfig.model_type:
        raise TwofoldError(_lacks(folder, CONFIG_FILE))
    try:
        config: TwofoldConfig = TwofoldConfig.from_pretrained(folder, local_files_only=True)
    except TwofoldError as error:
        raise TwofoldError(f"{folder / CONFIG_FILE} describes no model. {error}") from None
    return config


def read_max_tokens(folder: Path) -> int:
    """The longest text, in tokens. Raises TwofoldError where the folder does not say it."""
    max_tokens = read_json(folder / CACHE_FILE).get("max_tokens")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise TwofoldError(_lacks(folder, CACHE_FILE))
    return max_tokens


def model_path(folder: Path) -> Path:
    """The graph of an exported model. Raises TwofoldError where there is none."""
    if not (folder / MODEL_FILE).is_file():
        raise TwofoldError(f"There is no exported model in {folder}: it holds no {MODEL_FILE}; run `twofold export`.")
    return folder / MODEL_FILE


def _lacks(folder: Path, name: str) -> str:
    return f"{folder} holds no whole {name} of an exported model: run `twofold export` again."
