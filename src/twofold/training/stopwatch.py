"""Seconds spent on training steps, kept over resumptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Runs from its making on; ``seconds`` were spent before."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._origin = perf_counter() - seconds
        self._stopped: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far, pauses left out; it stands still inside one."""
        return (perf_counter() if self._stopped is None else self._stopped) - self._origin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._stopped = perf_counter()
        try:
            yield
        finally:
            self._origin += perf_counter() - self._stopped
            self._stopped = None
