"""A trained model from its folder, ours or one of Transformers', with what reads its text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from twofold.errors import TwofoldError
from twofold.estimate.weights import stored_weights
from twofold.existing.loading import load
from twofold.generation.codec import Codec, TokenizerCodec, codec_for
from twofold.geometry import others, ours
from twofold.geometry.capture import Layer, capture
from twofold.models import TwofoldConfig, TwofoldForCausalLM, build_model, load_model
from twofold.models.checkpoint import weight_files
from twofold.storage import read_json

MAX_UNTRAINED_PARAMETERS = 60_000_000
"""A model of at most so many parameters is built a second time, untrained, to be measured beside the trained one."""
MAX_LAYERS = 8
"""So many layers are measured unless others are asked for: the first, the last, and some between."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model in evaluation mode; ``is_ours`` tells a Twofold model, ``digest`` is the SHA-256 of its weight files.

    ``run`` says how it was trained, where that is known: the settings and the outcome of a run, JSON-ready.
    """

    model: PreTrainedModel
    codec: Codec
    name: str
    is_ours: bool
    num_layers: int
    max_tokens: int
    digest: str
    run: Mapping[str, Any] = field(default_factory=dict)

    def layers(self, asked: Sequence[int] = ()) -> list[int]:
        """The layers to measure. Raises TwofoldError for one that there is not."""
        for layer in asked:
            if not 0 <= layer < self.num_layers:
                raise TwofoldError(
                    f"There is no layer {layer}: the model's {self.num_layers} attention layers are counted from 0 to {self.num_layers - 1}."
                )
        if asked:
            return sorted(set(asked))
        count = min(self.num_layers, MAX_LAYERS)
        return sorted({round(i * (self.num_layers - 1) / max(1, count - 1)) for i in range(count)})

    def read(self, rows: Sequence[Tensor], layers: Sequence[int], *, shown: int) -> list[Layer]:
        """What the layers are made of while the model reads the rows."""
        return _capture(self.model, rows, layers, shown=shown)

    def read_untrained(self, rows: Sequence[Tensor], layers: Sequence[int], *, shown: int) -> list[Layer] | None:
        """The same of an untrained model with the same configuration; None where that would be a large one."""
        if sum(parameter.numel() for parameter in self.model.parameters()) > MAX_UNTRAINED_PARAMETERS:
            return None
        return _capture(self._untrained().to(self.model.device), rows, layers, shown=shown)

    def _untrained(self) -> PreTrainedModel:
        if isinstance(self.model, TwofoldForCausalLM):
            return build_model(self.model.config.spec, seed=0).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(self.model.config, attn_implementation="eager").float().eval()

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text; a byte that is no character in hexadecimal."""
        if isinstance(self.codec, TokenizerCodec):
            return [_piece(self.codec.tokenizer, token) for token in tokens]
        return [chr(token) if token < 128 else f"\\x{token:02x}" for token in tokens]


def open_model(folder: Path, *, name: str = "", device: torch.device | str = "cpu") -> Opened:
    """The model that a folder holds, called after the folder unless it has a ``name``. Raises TwofoldError, one sentence, where there is none, or none whose geometry is known."""
    kind = read_json(folder / "config.json").get("model_type")
    is_ours = kind == TwofoldConfig.model_type or kind is None
    if is_ours:
        own = load_model(folder)  # says what is wrong, also where there is no configuration
        if not isinstance(own, TwofoldForCausalLM):
            raise TwofoldError(
                f"The model in {folder} is a {own.config.architecture}: the page is made from a text, so it needs a causal_lm."
            )
        spec = own.config.spec
        num_layers, vocab, limit = spec.num_hidden_layers, spec.vocab_size, spec.positions.max_positions
        model: Any = own.to(device)
    else:
        model = _transformers_model(folder).to(device)
        config = model.config.get_text_config(decoder=True)
        num_layers, vocab = len(others.attentions(model)), int(config.vocab_size)
        limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    return Opened(
        model=model,
        codec=codec_for(folder, vocab),
        name=name or folder.resolve().name,
        is_ours=is_ours,
        num_layers=num_layers,
        max_tokens=limit,
        digest=_digest(folder),
    )


def _transformers_model(folder: Path) -> PreTrainedModel:
    weight_files(folder)  # refuses pickles, and says which file is missing
    stored = stored_weights(folder)
    free = psutil.virtual_memory().available
    if stored is not None and stored.file_bytes > free:
        raise TwofoldError(
            f"The weights in {folder} are {stored.file_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free: "
            "free some, or use a machine with more."
        )
    return load(str(folder), AutoModelForCausalLM, attn_implementation="eager", local_files_only=True)


def _capture(model: PreTrainedModel, rows: Sequence[Tensor], layers: Sequence[int], *, shown: int) -> list[Layer]:
    rows = [row.to(model.device) for row in rows]
    if isinstance(model, TwofoldForCausalLM):
        sources = ours.sources(model, layers)
        return capture(lambda row: model(row, use_cache=False, logits_to_keep=1), sources, rows, shown=shown)
    body = model.base_model  # without the head: nobody asks for logits
    return capture(lambda row: body(input_ids=row, use_cache=False), others.sources(model, layers), rows, shown=shown)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def _piece(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
