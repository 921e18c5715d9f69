"""Checkpoints measured in a serving engine while training goes on, each by a process of its own.

served/
    step_00000200/
        checkpoint/   hard links to the checkpoint: it stays for the measurement however many are kept
        eval.json     the result; its absence means that the measurement is still to be made
        eval.log      what the process said

A process measures one checkpoint; the next waits for it. A run that stops leaves what is unfinished to the next start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchspec.core.errors import CheckpointError, TorchspecError
from torchspec.core.training import checkpoint_files as files

logger = logging.getLogger(__name__)

FAILURE = "failure"
CHECKPOINT, RESULT, LOG = "checkpoint", "eval.json", "eval.log"
POLL_SECONDS = 0.5
BETWEEN_WORDS = 30.0
END_SECONDS = 20.0
LOG_LINES = 12

Command = Callable[[Path, Path], Sequence[str]]
"""(checkpoint, file for the result) -> the process to run. It writes the result even when it then fails over it."""


@dataclass(kw_only=True)
class _Running:
    step: int
    process: subprocess.Popen[bytes]
    started: float


class ServedChecks:
    """Of the main rank. `collect` gives rows for metrics.jsonl as they come."""

    def __init__(self, place: Path, checkpoints: Path, command: Command, *, engine: str, timeout: float) -> None:
        """`timeout` is what one measurement may take, in seconds."""
        self.place, self.checkpoints, self.engine = place, checkpoints, engine
        self._command, self._timeout = command, timeout
        self._running: _Running | None = None
        self.failures: list[str] = [found[FAILURE] for found in self._results() if FAILURE in found]
        """What an engine or its acceptance was found wrong with, now or in an earlier session, for the run's end."""

    def start(self, step: int) -> None:
        """Queue the checkpoint of this step, which is there."""
        folder = self._folder(step)
        if (folder / RESULT).exists() or (self._running is not None and self._running.step == step):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source = files.directory_of(self.checkpoints, step)
        shutil.copytree(source, folder / f".{CHECKPOINT}", copy_function=_link)
        (folder / f".{CHECKPOINT}").rename(folder / CHECKPOINT)
        self._next()

    def forget_after(self, step: int) -> None:
        """Measurements of steps that the run, going on from an earlier checkpoint, will take again."""
        for later in files.steps_on_disk(self.place):
            if later > step:
                shutil.rmtree(self._folder(later), ignore_errors=True)

    def collect(self) -> list[dict[str, Any]]:
        """Rows of measurements that have ended since; starts the next one. Does not wait."""
        rows = []
        running = self._running
        if running is not None:
            late = time.monotonic() - running.started > self._timeout
            if running.process.poll() is not None or late:
                self._end(running)
                self._running = None
                rows += self._result(running, late=late)
        self._next()
        return rows

    def wait(self, stopped: Callable[[], bool]) -> list[dict[str, Any]]:
        """Rows of everything that is queued; stops waiting, and the process, when `stopped`."""
        rows = self.collect()
        word = time.monotonic()
        while self._running is not None and not stopped():
            if time.monotonic() > word:
                passed = time.monotonic() - self._running.started
                logger.info(
                    "waiting for %s to measure the checkpoint of step %d, %.0f s of at most %.0f s (eval.timeout)",
                    self.engine, self._running.step, passed, self._timeout,
                )  # fmt: skip
                word = time.monotonic() + BETWEEN_WORDS
            time.sleep(POLL_SECONDS)
            rows += self.collect()
        return rows

    def close(self) -> None:
        """End what runs; the next start of this run measures it again."""
        if self._running is not None:
            self._end(self._running)
            self._running = None

    def _results(self) -> list[dict[str, Any]]:
        """Of earlier sessions."""
        found = []
        for step in files.steps_on_disk(self.place):
            with contextlib.suppress(CheckpointError):
                found.append(files.read_json(self._folder(step) / RESULT))
        return found

    def _folder(self, step: int) -> Path:
        return self.place / files.directory_of(self.place, step).name

    def _waiting(self) -> list[int]:
        return [step for step in files.steps_on_disk(self.place) if (self._folder(step) / CHECKPOINT).is_dir()]

    def _next(self) -> None:
        if self._running is not None:
            return
        for step in self._waiting():
            folder = self._folder(step)
            with (folder / LOG).open("wb") as log:
                process = subprocess.Popen(
                    list(self._command(folder / CHECKPOINT, folder / RESULT)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is for the training
                )
            self._running = _Running(step=step, process=process, started=time.monotonic())
            logger.info("measuring the checkpoint of step %d in %s; its log is %s", step, self.engine, folder / LOG)
            return

    def _end(self, running: _Running) -> None:
        process = running.process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # closes its engine
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _result(self, running: _Running, *, late: bool) -> list[dict[str, Any]]:
        folder = self._folder(running.step)
        try:
            found = files.read_json(folder / RESULT)
        except CheckpointError:
            found = None
        if running.process.returncode != 0 or found is None:
            why = f"took longer than {self._timeout:.0f} s (eval.timeout)" if late else _tail(folder / LOG)
            self._complain(f"{self.engine} at step {running.step}: {why}")
            if found is not None:
                files.write_json(folder / RESULT, {**found, FAILURE: self.failures[-1]})
        if found is None:
            shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
            return []
        row = {"kind": "served", "step": running.step, **{key: value for key, value in found.items() if _short(value)}}
        self._score(running.step, folder / CHECKPOINT, float(row["acceptance_length"]))
        return [row]

    def _score(self, step: int, copy: Path, score: float) -> None:
        """Note the score in the checkpoint; one that was dropped meanwhile comes back if it is the best."""
        best = files.best_step(self.checkpoints)
        directory = files.directory_of(self.checkpoints, step)
        if not directory.is_dir() and (best is None or score > best[1]):
            copy.rename(directory)
        if directory.is_dir():
            files.write_manifest(directory, replace(files.read_manifest(directory), score=score))
            files.write_best(self.checkpoints)
        shutil.rmtree(copy, ignore_errors=True)

    def _complain(self, text: str) -> None:
        self.failures.append(text)
        logger.error("%s", text)


class ServedCheckError(TorchspecError):
    """A checkpoint could not be measured where it will serve, or does not serve as it was trained."""


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
    return target


def _tail(log: Path) -> str:
    """What the process said last: its error."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "failed and left no log"
    starts = [number for number, line in enumerate(lines) if line.startswith("torchspec: ")]
    said = lines[starts[-1] :] if starts else lines[-LOG_LINES:]
    return "\n".join(said).removeprefix("torchspec: ") or f"failed; see {log}"


def _short(value: object) -> bool:
    """Figures go into the metrics; lists of texts stay in the result's own file."""
    return not isinstance(value, dict) and not (isinstance(value, list) and value and not isinstance(value[0], float))
