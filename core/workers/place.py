"""Where the worker is now: one that was given, or the newest of those that this run's supervisor started."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torchspec.core.errors import TargetError
from torchspec.core.settings import host_name
from torchspec.core.workers import protocol
from torchspec.core.workers.client import EngineLostError, WorkerClient
from torchspec.core.workers.supervisor import read_state

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
BETWEEN_WORDS = 15.0


class Place(Protocol):
    """`client` waits for a worker that is ready, with a deadline; `lost` says that this one is no more to be used."""

    def client(self) -> WorkerClient: ...
    def lost(self, client: WorkerClient) -> None: ...


class Attached:
    """A worker that somebody else started and looks after."""

    def __init__(self, url: str, token: str, *, name: str, patience: float) -> None:
        self._client = WorkerClient(url, token, name=name)
        self._patience = patience
        self._lost = False

    def client(self) -> WorkerClient:
        """After it was lost: once it answers again. TargetError when it does not in time."""
        start = time.monotonic()
        while self._lost:
            try:
                self._client.call(protocol.HELLO, {}, seconds=POLL_SECONDS, what="an answer")
                self._lost = False
            except EngineLostError as error:
                if time.monotonic() - start > self._patience:
                    waited = f"waited {self._patience:.0f} s for it (engine.start_timeout)"
                    raise TargetError(f"{error}; {waited}") from error
                time.sleep(1.0)
        return self._client

    def lost(self, client: WorkerClient) -> None:
        """Whoever started it may start it again."""
        said = "waiting for the worker at %s to answer, %.0f s at most (engine.start_timeout)"
        log.warning(said, client.url, self._patience)
        self._lost = True


class Managed:
    """The worker of a supervisor in this process or in the leading rank's, found through its state file."""

    def __init__(self, directory: Path, *, name: str, patience: float) -> None:
        self._directory, self._name, self._patience = directory, name, patience
        self._used = self._generation = self._pid = 0

    def client(self) -> WorkerClient:
        """TargetError when the supervisor gave up, or nothing is ready in time."""
        start = time.monotonic()
        word = BETWEEN_WORDS
        while True:
            state = read_state(self._directory)
            if state is not None and state.state == "failed":
                raise TargetError(state.reason)
            if state is not None and state.state == "ready" and state.generation > self._used:
                self._generation, self._pid = state.generation, state.pid
                return WorkerClient(state.url, state.token, name=self._name)
            passed = time.monotonic() - start
            if passed > self._patience:
                raise TargetError(
                    f"{self._name} was not ready within {self._patience:.0f} s (engine.start_timeout); its log is in "
                    f"{self._directory}"
                )
            if passed > word:
                log.info("waiting for %s to be ready, %.0f s of at most %.0f s", self._name, passed, self._patience)
                word = passed + BETWEEN_WORDS
            time.sleep(POLL_SECONDS)

    def lost(self, client: WorkerClient) -> None:
        """Only a later one will do: one that still lives is ended, so that its supervisor starts another."""
        self._used = self._generation
        try:
            client.call(protocol.STOP, {"abort": True}, seconds=1.0, what="ending it")
        except (EngineLostError, TargetError):
            # It is gone, or does not even hear that. Its number is another process's once its supervisor knows, or is
            # gone itself, and means nothing on another machine.
            now = read_state(self._directory)
            there = now is not None and (now.state, now.generation, now.host) == (
                "ready",
                self._generation,
                host_name(),
            )
            if there and _is_worker(self._pid):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(self._pid, signal.SIGKILL)


def _is_worker(pid: int) -> bool:
    try:
        return b"torchspec.core.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
