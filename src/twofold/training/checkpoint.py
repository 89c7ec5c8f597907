"""A run's state on disk: whole or absent, never a pickle, the last two kept.

    checkpoints/step-00000100/
        model.safetensors, config.json, ...   as save_pretrained writes them: the folder can be loaded as a model
        optimizer.safetensors                 AdamW's moments, by parameter name
        state.json                            where the run stands

The schedule, the place in the data and the random numbers of a step all follow from the step (see schedule, order, random_state).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_log

from twofold.errors import TwofoldError
from twofold.storage import new_folder, remove_folder, remove_leftovers, write_json, writing
from twofold.training.optimizer import optimizer_tensors, restore_optimizer

FOLDER_NAME = "checkpoints"
KEPT = 2
FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands, but for its tensors.

    ``losses`` are those of the steps since the last line of metrics.jsonl, ``scores`` those of the held-out data if they were taken at this step,
    ``scaler`` is the state of fp16's loss scale (empty elsewhere).
    """

    step: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    data_hash: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, in memory."""

    state: TrainingState
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint whole, before any of it is used. Raises OSError, SafetensorError or ValueError where it is damaged."""
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"state.json is not of format {FORMAT}")
        values["losses"] = tuple(values["losses"])
        tensors = [load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")]
        return cls(TrainingState(**values), *tensors)

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Give the model and its optimiser what was saved. Raises TwofoldError where it is of another model."""
        tied = set(model.all_tied_weights_keys)
        missing, unexpected = model.load_state_dict(self.model, strict=False)
        if wrong := sorted({*unexpected, *missing} - tied):
            raise TwofoldError(
                f"The checkpoint of step {self.state.step} is of another model (see {wrong[0]}): "
                "give the run another folder."
            )
        restore_optimizer(model, optimizer, self.optimizer)


class Checkpoints:
    """The checkpoints of the run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER_NAME

    def save(self, state: TrainingState, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of ``state.step``, then remove all but the last two. Raises TwofoldError where it cannot be written."""
        with writing(self.folder):
            with new_folder(self._path(state.step)) as partial:
                save_model(model, partial)
                save_file(optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
                write_json(partial / "state.json", {"format": FORMAT, **asdict(state)})
            for path in self._newest_first()[KEPT:]:
                remove_folder(path)

    def newest(self) -> Checkpoint | None:
        """The last checkpoint that is whole, or None where there is none at all.

        A damaged one is passed over with a warning in the log. Raises TwofoldError if all are damaged.
        """
        found = self._newest_first()
        for path in found:
            try:
                return Checkpoint.read(path)
            except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
                reason = error
                _log.warning("%s is damaged (%s); the checkpoint before it is used.", path, error)
        if found:
            raise TwofoldError(
                f"No checkpoint in {self.folder} is whole ({reason}): remove the run's folder to begin again."
            )
        return None

    def clean(self, step: int) -> None:
        """Remove what a run that goes on from ``step`` has no use for: what is half written, damaged, or older than the last two."""
        remove_leftovers(self.folder)
        whole = self._path(step)
        for path in [path for path in self._newest_first() if path > whole]:
            remove_folder(path)
        for path in self._newest_first()[KEPT:]:
            remove_folder(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _newest_first(self) -> list[Path]:
        return sorted(_steps(self.folder), reverse=True)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained`` into one file of weights, without Transformers' progress bar."""
    shows = transformers_log.is_progress_bar_enabled()
    transformers_log.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size="100TB")
    finally:
        if shows:
            transformers_log.enable_progress_bar()


def _steps(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("step-*") if path.is_dir())
