"""Files and folders that are there whole or not at all, whatever kills the process, and one sentence where they cannot be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from twofold.errors import TwofoldError

HIDDEN = "."
"""How the name of a file or folder begins while it is not whole."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise TwofoldError, naming the folder and the reason, where the system refuses to write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TwofoldError(
            f"{folder} cannot be written to ({reason}): what was saved there before is intact, "
            "so make room or give another folder, and run the same again."
        ) from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by the values as JSON."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file or it holds no whole JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text."""
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill beside ``path``; it takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Its files have reached the disk before it is renamed: after a power cut, too, a folder of that name is whole.
    """
    partial = _partial(path)
    remove_folder(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        sync_folder(partial)
        remove_folder(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, if there is one, under a hidden name: half a folder never bears the name of a whole one."""
    if not path.exists():
        return
    if not path.name.startswith(HIDDEN):
        hidden = path.with_name(f"{HIDDEN}{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    shutil.rmtree(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what an earlier process was killed over: hidden files and folders that were being written or removed."""
    for pattern in (f"{HIDDEN}*.partial", f"{HIDDEN}*.removed"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Have a folder's entries reach the disk (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "posix":
        _sync(path)


def _partial(path: Path) -> Path:
    """Where a file or folder is made. Two processes that write the same one (a report, say) do not meet there."""
    return path.with_name(f"{HIDDEN}{path.name}.{os.getpid()}.partial")


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
