"""The worker's process: how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspec.core.workers import protocol

FAKE = Path(__file__).parent


@pytest.fixture
def worker(tiny_target: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """With a parent's pipe, and its log."""
    log = tmp_path / "log"
    words = [sys.executable, "-m", "torchspec.core.workers", "fake_runner", "--target", str(tiny_target)]
    words += ["--announce", str(tmp_path / "worker.json"), "--with-parent"]
    environment = {**os.environ, protocol.TOKEN_VARIABLE: "secret", "PYTHONPATH": str(FAKE)}
    environment.pop("PYTHONSAFEPATH", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    until = time.monotonic() + 60
    while not (tmp_path / "worker.json").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert "pid" in json.loads((tmp_path / "worker.json").read_text()), log.read_text()
    yield process, log
    assert process.stdin is not None
    process.stdin.close()
    process.kill()
    process.wait()


def test_one_that_is_asked_to_ends_in_order(worker: tuple[subprocess.Popen[bytes], Path]) -> None:
    """Although a thread of its waits for its parent's end."""
    process, log = worker
    process.terminate()
    assert process.wait(20) == 0, log.read_text()


def test_one_whose_parent_is_gone_ends(worker: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, _ = worker
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) != 0
