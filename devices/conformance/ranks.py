"""Several ranks of a device on this machine, each a real process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core import settings
from torchspec.core.conformance.apart import tied
from torchspec.core.conformance.checks import NotHereError
from torchspec.devices.conformance.subject import Subject

RANKS = 2
"""As few as there can be; what needs a direction or groups takes MANY where there are devices for them."""
MANY = 4


def needs_ranks(subject: Subject) -> None:
    if not subject.can_hold_ranks(RANKS):
        raise NotHereError(f"needs {RANKS} devices; {subject.device.runtime.device_count()} visible")


def run_ranks(words: Sequence[str], seconds: float, count: int = RANKS) -> None:
    """`python -P -m WORDS` as each of `count` ranks; AssertionError with the end of what the first that failed said."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(count)]
        ranks = [_start(words, rank, count, store.port, log) for rank, log in enumerate(logs)]
        try:
            _wait(ranks, logs, time.monotonic() + seconds, seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _start(words: Sequence[str], rank: int, count: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    environment = settings.rank_environment(rank=rank, world_size=count, address="127.0.0.1", port=port)
    with log.open("wb") as told:
        command = tied([sys.executable, "-P", "-m", *words])
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=told, stderr=told)


def _wait(ranks: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float, seconds: float) -> None:
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        assert not failed, _failure(failed[0], ranks, logs)
        assert time.monotonic() < deadline, f"{len(ranks)} ranks were not done within {seconds:.0f} s: {_end(logs[0])}"
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.returncode != 0]
    assert not failed, _failure(failed[0], ranks, logs)


def _failure(rank: int, ranks: list[subprocess.Popen[bytes]], logs: list[Path]) -> str:
    return f"rank {rank} of {len(ranks)} ended with code {ranks[rank].returncode}: {_end(logs[rank])}"


def _end(log: Path) -> str:
    return " | ".join(line.strip() for line in log.read_text(errors="replace").splitlines()[-3:]) or "(it said nothing)"
