"""metrics.jsonl: what a run measured, a line as soon as it is known, for ``pandas.read_json(path, lines=True)``; TensorBoard beside it if wanted.

{"step": 10, "tokens": 5120, "seconds": 0.42, "split": "train", "loss": 5.1, "learning_rate": 0.001, "gradient_norm": 0.9}
{"step": 10, "tokens": 5120, "seconds": 0.42, "split": "held_out", "loss": 5.2, "bits_per_byte": 7.5}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from twofold.errors import TwofoldError
from twofold.storage import write_text, writing

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Split = Literal["train", "held_out"]


class MetricsLog:
    """The metrics of a run that stands at ``step``: lines beyond it, which a killed process left, are cut off first.

    A context manager. Raises TwofoldError where the file cannot be written, or where TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self.path = folder / FILE_NAME
        self._board = _board(folder / TENSORBOARD_FOLDER, step) if tensorboard else None
        with writing(folder):
            write_text(self.path, _lines_up_to(self.path, step))
            self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def write(self, *, step: int, tokens: int, seconds: float, split: Split, values: Mapping[str, float]) -> None:
        """Append a line. A value that is no finite number, for which JSON has no word, becomes null."""
        line: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": round(seconds, 6), "split": split}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self.path.parent):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def sync(self) -> None:
        """Have the lines reach the disk: a checkpoint must not outlive the lines before it."""
        with writing(self.path.parent):
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written is still in the file's buffer, and fails again.
        try:
            self._file.close()
        except OSError:
            if kind is None:
                raise
        if self._board is not None:
            self._board.close()


def _lines_up_to(path: Path, step: int) -> str:
    """The whole lines of steps up to ``step``."""
    if not path.is_file():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError):
            continue  # the line that a killed process was writing
    return "".join(kept)


def _board(folder: Path, step: int) -> Any:
    try:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise TwofoldError(
            "TensorBoard is not installed: run pip install 'twofold[tensorboard]', or train without it."
        ) from None
    with writing(folder):
        return writer(folder, purge_step=step + 1)
