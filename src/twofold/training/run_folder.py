"""The folder of a run: which run it is, what it has reached, and how it ended.

run.json         the RunSpec; whoever trains here must bring the same one
metrics.jsonl    see metrics
checkpoints/     see checkpoint
model/           the last weights, for load_model and from_pretrained
outcome.json     the Outcome; its presence means that the run has ended
runner.lock      see lock: one process at a time trains here
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from twofold.errors import TwofoldError
from twofold.storage import new_folder, remove_leftovers, write_json, writing
from twofold.training.checkpoint import FOLDER_NAME as CHECKPOINTS
from twofold.training.checkpoint import save_model
from twofold.training.metrics import FILE_NAME as METRICS
from twofold.training.progress import Outcome
from twofold.training.spec import RunSpec

RUN = "run.json"
MODEL = "model"
OUTCOME = "outcome.json"


class RunFolder:
    """A folder that holds one run, or will."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, run: RunSpec) -> None:
        """Raise TwofoldError if the folder holds another run, or cannot be said to hold this one."""
        if not (self.path / RUN).is_file():
            if results := [name for name in (METRICS, CHECKPOINTS, OUTCOME) if (self.path / name).exists()]:
                raise TwofoldError(
                    f"{self.path} holds {results[0]} but no {RUN}, so nobody knows of which run: choose another folder."
                )
            return
        stored = self._stored_run()
        if stored.fingerprint != run.fingerprint:
            differences = list(_differences(stored.to_dict(), run.to_dict()))
            others = f" and {len(differences) - 2} more" if len(differences) > 2 else ""
            raise TwofoldError(
                f"{self.path} holds another run ({'; '.join(differences[:2])}{others}): choose another folder, or remove that one."
            )

    def _stored_run(self) -> RunSpec:
        path = self.path / RUN
        try:
            return RunSpec.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TwofoldError) as error:
            raise TwofoldError(f"{path} cannot be read ({error}): choose another folder, or remove that one.") from None

    def begin(self, run: RunSpec) -> None:
        """Make the folder and write run.json, if that is still to be done. Raises TwofoldError where it cannot be written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            if not (self.path / RUN).is_file():
                write_json(self.path / RUN, run.to_dict())

    def outcome(self) -> Outcome | None:
        """How the run ended, or None if it has not, or left no whole account of it."""
        try:
            return Outcome.from_dict(json.loads((self.path / OUTCOME).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def end(self, model: PreTrainedModel, outcome: Outcome) -> None:
        """Write the last weights, then the outcome. Raises TwofoldError where they cannot be written."""
        with writing(self.path):
            with new_folder(self.path / MODEL) as partial:
                save_model(model, partial)
            write_json(self.path / OUTCOME, outcome.to_dict())


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Fields that differ: ``training.steps is 100 there and 200 here``."""
    for name in sorted(stored.keys() | given.keys()):
        there, here = stored.get(name), given.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name} is {there!r} there and {here!r} here"
