"""The processes that train: started once, given one run after another, never outliving whoever started them.

Each worker is a Python process of its own (see :mod:`twofold.study.worker`) that reads commands from its standard input and answers on its
standard output, a JSON object per line. A thread per worker moves the answers into one queue, so that whoever runs the pool waits in one place.
On a CPU a worker computes with one thread: processes of one thread each beat one process of many. With graphics processors each
worker sees exactly one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SECONDS_TO_STOP = 5.0


class Worker:
    """One process. ``device`` is the index of its graphics processor, or None for the CPU."""

    def __init__(self, number: int, answers: queue.SimpleQueue[Answer], log: Path, device: int | None) -> None:
        self.number = number
        self.device = device
        self.log = log
        self._answers = answers
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), **_visible(device)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                # -P: a file of the working directory must not pass for a module.
                [sys.executable, "-P", "-m", "twofold.study.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(Answer(self, json.loads(line)))
        self._answers.put(Answer(self, {"event": "exited", "code": self._process.wait()}))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, command: Mapping[str, Any]) -> None:
        """Give a command; one to a process that has just died is lost, and its end is in the queue."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass

    def stop(self) -> None:
        """End the process now. A run in progress goes on from its checkpoint when it is run again."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Answer:
    """What a worker said: an object with an ``event``."""

    worker: Worker
    values: dict[str, Any]

    @property
    def event(self) -> str:
        """What happened: ready, expanded, refused, started, progress, done, failed, or exited."""
        return str(self.values["event"])


class Pool:
    """The workers of one runner."""

    def __init__(self, log_folder: Path) -> None:
        self.workers: list[Worker] = []
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._log_folder = log_folder

    def start(self, device: int | None = None) -> Worker:
        """One more worker; it says ``ready`` when it has loaded what it needs."""
        number = len(self.workers)
        worker = Worker(number, self._answers, self._log_folder / f"worker-{number}.log", device)
        self.workers.append(worker)
        return worker

    def replace(self, worker: Worker) -> Worker:
        """A new worker in the place of one that has ended."""
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
        """End all workers."""
        for worker in self.workers:
            worker.stop()


def _visible(device: int | None) -> dict[str, str]:
    if device is None:
        return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if allowed and device >= len(allowed):
        raise TwofoldError(f"There is no graphics processor number {device}: CUDA_VISIBLE_DEVICES allows {len(allowed)}.")
    return {"CUDA_VISIBLE_DEVICES": allowed[device] if allowed else str(device), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
