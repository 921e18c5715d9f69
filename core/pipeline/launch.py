"""`--nproc N`: N ranks of one command on this machine.

What torchrun does for one node, with three differences that a graceful stop needs: a signal reaches every rank exactly
once (the ranks live in their own sessions, so a terminal's Ctrl-C does not also hit them), the time they get for their
checkpoint is ours to set, and their exit code is handed on. torchrun itself works too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import IO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core.errors import ConfigError, Problem, TorchspecError
from torchspec.core.features.shared import is_alive
from torchspec.core.settings import launcher, rank_environment

LOOPBACK = "127.0.0.1"
SHUTDOWN_SECONDS = 120.0
"""After a signal: long enough for the step in progress and a checkpoint."""
PEER_SECONDS = 15.0
"""After a rank died: its peers cannot finish anything, they only get to say so."""
POLL_SECONDS = 0.05
TAIL_BYTES = 4000
_PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None


def launch(
    command: Sequence[str],
    nproc: int,
    *,
    shutdown_seconds: float = SHUTDOWN_SECONDS,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run `command` in `nproc` processes, with torchrun's environment variables and these; -> 0 or the first failure's
    code.

    Rank 0 writes to this process's output; the end of another rank's errors is shown only if that rank failed.
    SIGINT and SIGTERM go to every rank; those still there after `shutdown_seconds`, or at a second signal, are killed.
    A rank that a signal ended counts as exit code 128 + its number.
    """
    if nproc < 1:
        raise ConfigError([Problem(field="nproc", message="at least one process is needed", value=nproc)])
    # This process holds the rendezvous, on a port the system picks: no port is guessed and then found taken.
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10))
    with contextlib.ExitStack() as stack:
        ranks = [_start(command, number, nproc, store.port, stack, variables or {}) for number in range(nproc)]
        stack.callback(_kill, ranks)
        with _forwarding(ranks) as received:
            return _wait(ranks, received, shutdown_seconds)


def torchspec_command(arguments: Sequence[str]) -> list[str]:
    """The command line of one rank. As with the installed command, no module is imported from the working directory."""
    return [sys.executable, "-P", "-m", "torchspec", *arguments]


def follow_launcher() -> None:
    """In a rank: have the system send SIGTERM here when the launcher dies, however it dies (Linux only). It leaves a
    checkpoint.

    TorchspecError when the launcher is gone already: it held the rendezvous, for which the rank would wait in vain.
    """
    starter = launcher()
    if sys.platform == "linux" and os.getppid() == starter:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if starter is not None and os.getppid() != starter and not is_alive(starter):
        raise TorchspecError("the process that started this one has ended: start the command again")


def _start(
    command: Sequence[str],
    number: int,
    nproc: int,
    port: int,
    stack: contextlib.ExitStack,
    variables: Mapping[str, str],
) -> _Rank:
    errors = None if number == 0 else stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    process = subprocess.Popen(
        list(command),
        env={**rank_environment(rank=number, world_size=nproc, address=LOOPBACK, port=port), **variables},
        stdin=subprocess.DEVNULL,
        stdout=None if errors is None else subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    return _Rank(number=number, process=process, errors=errors)


@contextlib.contextmanager
def _forwarding(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """Pass the first signal on to every rank and note it; a second one is noted only, and ends the wait."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _signal(ranks, number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[_Rank], received: Sequence[int], shutdown_seconds: float) -> int:
    """Until all have ended; -> the exit code."""
    failed: _Rank | None = None
    deadline: float | None = None
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if failed is None:
            failures = [(rank, code) for rank, code in zip(ranks, codes, strict=True) if code]
            # Of several at once, one that was killed is the cause: the others lost it.
            failed = min(failures, key=lambda pair: pair[1] > 0)[0] if failures else None
            if failed is not None and not received:
                deadline = time.monotonic() + PEER_SECONDS
                _signal(ranks, signal.SIGTERM)
        if all(code is not None for code in codes):
            break
        if received and deadline is None:
            deadline = time.monotonic() + shutdown_seconds
        if len(received) > 1 or (deadline is not None and time.monotonic() > deadline):
            _kill(ranks)
        time.sleep(POLL_SECONDS)
    if failed is None:
        return 0
    if not received and (failed.number != 0 or failed.process.returncode < 0):
        _tell_failure(failed)
    code = failed.process.returncode
    return code if code > 0 else 128 - code


def _tell_failure(rank: _Rank) -> None:
    code = rank.process.returncode
    if code >= 0:
        how = f"failed (exit code {code})"
    else:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        often = ", often for want of memory" if -code == signal.SIGKILL else ""
        how = (
            f"was killed by signal {-code} ({name}{often}); the newest checkpoint counts: "
            "the same command continues from it"
        )
    print(f"rank {rank.number} {how}", file=sys.stderr)
    if rank.errors is None:  # its output was ours
        return
    size = rank.errors.seek(0, os.SEEK_END)
    rank.errors.seek(max(0, size - TAIL_BYTES))
    tail = rank.errors.read().decode(errors="replace").rstrip()
    if tail:
        print(f"rank {rank.number} said:\n{tail}", file=sys.stderr)


def _signal(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _kill(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
            rank.process.wait()
