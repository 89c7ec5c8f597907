"""One process per folder of a study or a run: an operating-system lock, which dies with its holder, and a note of who holds it."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from twofold.errors import TwofoldError
from twofold.storage import writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FILE_NAME = "runner.lock"


class FolderLock:
    """Held while a process works in ``folder``. A killed process's lock is free at once; nothing has to be cleaned up by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Take the lock. Raises TwofoldError, naming the holder, where another process has it, and where the folder cannot be written to."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
            try:
                _lock(self._file)
            except OSError:
                self._file.close()
                holder = _holder(self.path)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise TwofoldError(
                    f"{self.folder} is being run by {who}: wait for it, stop it, or choose another folder."
                ) from None
            self._write({"pid": os.getpid(), "host": socket.gethostname(), "created": psutil.Process().create_time()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._write(None)
        self._file.close()

    def _write(self, holder: dict[str, Any] | None) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(holder) if holder else "")
        self._file.flush()


def is_held(folder: Path) -> bool:
    """Whether a runner is at work in the folder. One on another machine cannot be asked and counts as alive."""
    holder = _holder(folder / FILE_NAME)
    if not holder:  # never held, or given back
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        # The start time tells a later process that was given the same number from the one that wrote the note.
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["created"]) < 1.0
    except psutil.Error:
        return False


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and {"pid", "host", "created"} <= holder.keys() else {}


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        file.seek(2**30)  # beyond the note, which others must be able to read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
