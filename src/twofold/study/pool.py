"""The processes that train: started once, given one run after another, never outliving whoever started them.

Each worker is a Python process of its own (see :mod:`twofold.study.worker`) that reads commands from its standard input and answers on its
standard output, a JSON object per line. A thread per worker moves the answers into one queue, so that whoever runs the pool waits in one place.
On a CPU a worker computes with one thread: processes of one thread each beat one process of many. With graphics processors each
worker sees exactly one, and is given as many alike runs at a time as its memory holds (see :mod:`twofold.study.handouts`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

# -P: a file of the working directory must not pass for a module.
COMMAND = (sys.executable, "-P", "-m", "twofold.study.worker")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SECONDS_TO_STOP = 5.0
LOG_TAIL_BYTES = 4096


class Worker:
    """One process. ``device`` is the index of its graphics processor, or None for the CPU."""

    def __init__(self, number: int, answers: queue.SimpleQueue[Answer], log: Path, device: int | None) -> None:
        self.number = number
        self.device = device
        self.memory_bytes = 0  # free on the graphics processor when the worker got ready
        self.log = log
        self._answers = answers
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), **_visible(device)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                if values := _whole_answer(line):
                    self._answers.put(Answer(self, values))
        self._answers.put(Answer(self, {"event": "exited", "code": self._process.wait()}))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, command: Mapping[str, Any]) -> None:
        """Give a command; one to a process that has just died is lost, and its end is in the queue."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def last_words(self) -> str:
        """The last line of its log, which after a crash is the error; empty where it left none."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def terminate(self) -> None:
        """Ask the process to end now. A run in progress goes on from its checkpoint when it is run again."""
        self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait until the process has ended; kill it where that takes longer than ``seconds``."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a command that it did not read any more
            self._process.stdin.close()


@dataclass(frozen=True)
class Answer:
    """What a worker said: an object with an ``event``."""

    worker: Worker
    values: dict[str, Any]

    @property
    def event(self) -> str:
        """What happened: ready, expanded, refused, progress, ended (one of many runs), done, failed, or exited."""
        return str(self.values["event"])


class Pool:
    """The workers of one runner; as a context, it ends them all when it is left."""

    def __init__(self, log_folder: Path) -> None:
        self.workers: list[Worker] = []
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._log_folder = log_folder

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, device: int | None = None) -> Worker:
        """One more worker; it says ``ready`` when it has loaded what it needs."""
        number = len(self.workers)
        worker = Worker(number, self._answers, self._log_folder / f"worker-{number}.log", device)
        self.workers.append(worker)
        return worker

    def replace(self, worker: Worker) -> Worker:
        """A new worker in the place of one that has ended."""
        worker.wait(SECONDS_TO_STOP)
        new = Worker(worker.number, self._answers, worker.log, worker.device)
        self.workers[self.workers.index(worker)] = new
        return new

    def next_answer(self, timeout_seconds: float) -> Answer | None:
        """The next thing that a worker says, or None if none says anything in time."""
        try:
            return self._answers.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """End all workers, at once and not one after another."""
        for worker in self.workers:
            worker.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for worker in self.workers:
            worker.wait(max(0.0, deadline - time.monotonic()))


def _whole_answer(line: bytes) -> dict[str, Any]:
    """The answer in a line; empty for half a line of a process that was killed, or a library's stray print."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) and "event" in values else {}


def _visible(device: int | None) -> dict[str, str]:
    if device is None:
        return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if allowed and device >= len(allowed):
        raise TwofoldError(
            f"There is no graphics processor number {device}: CUDA_VISIBLE_DEVICES allows {len(allowed)}."
        )
    return {"CUDA_VISIBLE_DEVICES": allowed[device] if allowed else str(device), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
