"""Checks in a process of their own: an adapter that crashes, hangs or prints takes nothing with it.

`run_apart` starts `python -m MODULE --descriptor N [words] -- CHECK...`, whose main is `answer`: a JSON line before and
after each check through that descriptor. When the process dies or a check outlasts its deadline, that check has failed,
and another process takes those that remain.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from typing import IO, Any

from torchspec.core.conformance.checks import Check, Result, Subject, failed, perform

LOADING = "loading"
"""The name under which a failure before the first check is told."""

_LAST_LINES = 12
_EXIT_SECONDS = 10.0
# The system kills it when the thread that started it ends, however that comes (Linux); argv: our pid, then the command.
_TIED = (
    "import ctypes, os, signal, sys\n"
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))\n"
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])\n"
)


def tied(command: Sequence[str]) -> list[str]:
    """This command, its program given by a path, as one that does not outlive the thread that starts it (Linux)."""
    return [sys.executable, "-P", "-c", _TIED, str(os.getpid()), *command]


def run_apart(
    module: str,
    words: Sequence[str],
    checks: Sequence[Check[Any]],
    *,
    start_seconds: float,
    progress: Callable[[str], None] = lambda check: None,
) -> Generator[Result]:
    """The result of every check, in order; of LOADING alone where the process does not come so far.

    `words` are for the process, `progress` is told the name of each check as it begins. The process ends with this
    generator, and, on Linux, with the thread that reads it.
    """
    remaining = list(checks)
    while remaining:
        for result in _one_process(module, words, remaining, start_seconds, progress):
            yield result
            if result.check == LOADING:
                return
            remaining.pop(0)


def answer(
    descriptor: int, names: Sequence[str], checks: Sequence[Check[Subject]], load: Callable[[], Subject]
) -> None:
    """The process's side: perform the named checks, and tell each. `load` makes their subject; what it raises is told
    as the result of LOADING."""
    known = {check.name: check for check in checks}
    with os.fdopen(descriptor, "w") as told:
        began = time.monotonic()
        try:
            subject = load()
        except (Exception, SystemExit) as error:  # an adapter may fail in any way; that is a result  # noqa: BLE001
            _tell(told, asdict(failed(LOADING, error, time.monotonic() - began)))
            return
        for name in names:
            _tell(told, {"began": name})
            _tell(told, asdict(perform(known[name], subject)))


def _tell(told: IO[str], facts: dict[str, Any]) -> None:
    print(json.dumps(facts), file=told, flush=True)


def _one_process(
    module: str,
    words: Sequence[str],
    checks: Sequence[Check[Any]],
    start_seconds: float,
    progress: Callable[[str], None],
) -> Iterator[Result]:
    """Results until it has done them all, died, or was stopped; the last is then of the check that it was in."""
    reader, writer = os.pipe()
    command = [
        sys.executable,
        "-P",
        "-m",
        module,
        "--descriptor",
        str(writer),
        *words,
        "--",
        *(each.name for each in checks),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as log, os.fdopen(reader, "rb", buffering=0) as lines:
        process = subprocess.Popen(
            tied(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer,), start_new_session=True
        )
        os.close(writer)
        try:
            yield from _results(process, lines, log, checks, start_seconds, progress)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _results(
    process: subprocess.Popen[bytes],
    lines: FileIO,
    log: IO[str],
    checks: Sequence[Check[Any]],
    start_seconds: float,
    progress: Callable[[str], None],
) -> Iterator[Result]:
    deadlines = {check.name: check.seconds for check in checks}
    inside, began, left = LOADING, time.monotonic(), len(checks)
    while left:
        limit = deadlines.get(inside, start_seconds)
        line = _next_line(lines, began + limit)
        if not line:
            text = f"not done within {limit:.0f} s" if line is None else _ended(process)
            seconds = time.monotonic() - began
            yield Result(check=inside, status="FAIL", text=text, seconds=seconds, where=_last_lines(log))
            return
        facts = json.loads(line)
        if "began" in facts:
            inside, began = facts["began"], time.monotonic()
            progress(inside)
            continue
        left -= 1
        yield Result(**facts)
        if facts["check"] == LOADING:
            return


def _ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:  # it has closed the descriptor, or is held up on its way out
        return f"the process fell silent, and had not ended {_EXIT_SECONDS:.0f} s later"
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"the process ended with {how}"


def _next_line(lines: FileIO, deadline: float) -> bytes | None:
    """None when none comes in time, empty at the end. Nothing is buffered here, so `select` sees all there is."""
    ready, _, _ = select.select([lines], [], [], max(0.0, deadline - time.monotonic()))
    return lines.readline() if ready else None


def _last_lines(log: IO[str]) -> str:
    log.seek(0)
    return "\n".join(log.read().splitlines()[-_LAST_LINES:])
