"""The folder of a run: where it goes unless said otherwise, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.training.spec import RunSpec

RUN_FILE = "run.json"


def default_folder(run: RunSpec) -> Path:
    """``runs/text-1a2b3c4d``: the same settings have the same folder, so the same command resumes its own run."""
    return Path("runs") / f"{run.task.name}-{run.fingerprint[:8]}"


def read_run(folder: Path) -> RunSpec:
    """The run that a folder holds. Raises TwofoldError where it holds none, or a damaged one."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise TwofoldError(f"{folder} holds no {RUN_FILE}, so it is no run: name a folder that `twofold train` wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no fields")
    except (OSError, ValueError) as error:
        raise TwofoldError(f"{path} cannot be read ({error}): it is damaged, train again in a new folder.") from None
    return RunSpec.from_dict(values)


def model_folder(folder: Path) -> Path:
    """Where the trained model is. Raises TwofoldError where the run has not ended."""
    path = folder / "model"
    if not path.is_dir():
        raise TwofoldError(f"{folder} holds no trained model yet: go on with `twofold train --folder {folder}`.")
    return path
