"""A worker of one's own: started, watched, started again when it dies, and never left behind.

Where it is to be found stands in a file that other ranks of this machine read too; so all of them, the one that started
it included, meet the next worker in the same way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspec.core.errors import TargetError
from torchspec.core.settings import host_name
from torchspec.core.workers.protocol import TOKEN_VARIABLE

log = logging.getLogger(__name__)

STATE = "worker.json"
POLL_SECONDS = 0.1
FIRST_WORD, BETWEEN_WORDS = 10.0, 30.0
LOG_LINES = 15
MOST_CAUSES = 3
_ERROR = re.compile(r"^.*?\b([A-Z]\w*(?:Error|Exception): \S.*)$", re.MULTILINE)
STOP_SECONDS = 20.0
MOST_RESTARTS = 50
MOST_KILLED = 3
"""Of one start."""


class WorkerKilledError(TargetError):
    """A signal ended it."""


@dataclass(frozen=True, kw_only=True)
class State:
    """`generation` counts the workers that were ready; `pid` is of `host`. `reason`: why it failed for good."""

    state: str  # starting | ready | failed | closed
    generation: int = 0
    url: str = ""
    token: str = ""
    pid: int = 0
    host: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A worker's command, without what the supervisor adds; `name` is for people."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    start_timeout: float


class Supervisor:
    """Owns the process. `start` returns when the worker is ready."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        before = read_state(launch.directory)
        # Who still looks for the last worker of a supervisor that died waits for one after it.
        self._generation = 0 if before is None else before.generation
        self._restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self.log_file = launch.directory / f"{launch.name}.log"

    @property
    def state_file(self) -> Path:
        return self._launch.directory / STATE

    @property
    def pid(self) -> int:
        """Of the worker that runs now."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """TargetError with the end of its log when the worker does not come up in time."""
        self._launch.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            self.log_file.unlink()
        try:
            self._start_one()
        except BaseException as error:
            self._end_process()
            self._write(State(state="failed", reason=str(error)))
            raise
        self._watcher = threading.Thread(target=self._watch, name="engine-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stop the worker and everything it started."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join(timeout=STOP_SECONDS)
        self._end_process()
        with contextlib.suppress(OSError):
            self._write(State(state="closed", generation=self._generation))

    def _start_one(self) -> None:
        """One that is killed while it starts need not be the engine's fault, and is tried again."""
        for attempt in range(1, MOST_KILLED + 1):
            try:
                self._try_one()
                return
            except WorkerKilledError as error:
                if attempt == MOST_KILLED:
                    raise
                log.warning("%s: starting it again", error)
                self._end_process()

    def _try_one(self) -> None:
        launch, token = self._launch, secrets.token_urlsafe(32)
        self._write(State(state="starting", generation=self._generation))
        log.info("starting %s; its log is %s", launch.name, self.log_file)
        with tempfile.TemporaryDirectory() as place, self.log_file.open("ab") as output:
            announced = Path(place) / "announced.json"
            self._process = subprocess.Popen(
                [*launch.command, "--announce", str(announced), "--with-parent"],
                stdin=subprocess.PIPE,  # its end is how the worker learns that this process has gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**launch.environment, TOKEN_VARIABLE: token},
                start_new_session=True,
            )
            facts = self._announcement(announced)
        self._generation += 1
        url = f"http://{facts['host']}:{facts['port']}"
        ready = State(
            state="ready", generation=self._generation, url=url, token=token, pid=self._process.pid, host=host_name()
        )
        self._write(ready)
        log.info("%s is ready", launch.name)

    def _announcement(self, path: Path) -> dict[str, object]:
        assert self._process is not None
        name, seconds = self._launch.name, self._launch.start_timeout
        start, word = time.monotonic(), FIRST_WORD
        while not path.exists():
            passed = time.monotonic() - start
            if self._process.poll() is not None and not path.exists():
                code = self._process.returncode
                kind = WorkerKilledError if code < 0 else TargetError
                raise kind(f"{name} ended while it started ({_ending(code)}){self._tail()}")
            if passed > seconds:
                raise TargetError(f"{name} did not start within {seconds:.0f} s (engine.start_timeout){self._tail()}")
            if self._closing.is_set():
                raise TargetError(f"{name} was stopped while it started")
            if passed > word:
                log.info("waiting for %s to start, %.0f s of at most %.0f s", name, passed, seconds)
                word = passed + BETWEEN_WORDS
            time.sleep(POLL_SECONDS)
        facts: dict[str, object] = json.loads(path.read_text())
        if "error" in facts:
            raise TargetError(f"{name} cannot start: {facts['error']}\n    its log is {self.log_file}{self._causes()}")
        return facts

    def _watch(self) -> None:
        """Start another worker whenever one has died; give up when one does not come up, or too many have died."""
        while not self._closing.wait(POLL_SECONDS):
            assert self._process is not None
            code = self._process.poll()
            if code is None:
                continue
            log.warning("%s died (%s)%s", self._launch.name, _ending(code), self._tail(lines=3))
            self._end_process()
            try:
                self._restarts += 1
                if self._restarts > MOST_RESTARTS:
                    raise TargetError(f"{self._launch.name} died {self._restarts} times: it is not started again")
                self._start_one()
            except (TargetError, OSError) as error:
                if not self._closing.is_set():
                    log.error("%s", error)
                self._end_process()
                self._write(State(state="failed", generation=self._generation, reason=str(error)))
                return

    def _end_process(self) -> None:
        """First the worker, politely; then whatever of its process group is left."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _write(self, state: State) -> None:
        """Whole or not at all, and for this user alone: it holds the token."""
        aside = self.state_file.with_name(f".{STATE}.{os.getpid()}.new")
        aside.touch(mode=0o600)
        aside.chmod(0o600)
        aside.write_text(json.dumps(asdict(state)))
        aside.replace(self.state_file)

    def _tail(self, lines: int = LOG_LINES) -> str:
        try:
            text = self.log_file.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        shown = "".join(f"\n    | {line}" for line in text[-lines:])
        return f"; its log {self.log_file} ends with{shown}" if shown else ""

    def _causes(self) -> str:
        """The errors in the log, the first ones first. An engine's processes write theirs there and then die, and who
        waits for them knows the death alone."""
        try:
            found = _ERROR.findall(self.log_file.read_text(errors="replace"))
        except OSError:
            return ""
        shown = "".join(f"\n    | {line}" for line in list(dict.fromkeys(found))[:MOST_CAUSES])
        return f", with the errors{shown}" if shown else ""


def read_state(directory: Path) -> State | None:
    """What the leading rank wrote; None as long as it has not."""
    try:
        return State(**json.loads((directory / STATE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
