"""Collectives between real processes, started as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("collectives_worker.py")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchanges_between_processes(ranks: int) -> None:
    """all_to_all and ring_exchange: the world, groups that leave ranks out, and a peer that never answers."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [sys.executable, *launcher, str(WORKER), "cpu", "exchanges"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    for rank in range(ranks):  # ranks share the pipe: their lines may run together
        assert f"rank {rank} of {ranks} ok" in result.stdout


def test_a_world_of_one_without_a_launcher(device_name: str) -> None:
    """Two at the same time, on one machine and without any environment: no port to fight over."""
    command = [sys.executable, str(WORKER), device_name, "exchanges"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    workers = [subprocess.Popen(command, **options) for _ in range(2)]  # type: ignore[call-overload]
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert (worker.returncode, out.strip()) == (0, "rank 0 of 1 ok"), err


def test_worlds_that_cannot_be_are_errors_for_people() -> None:
    result = subprocess.run(
        [sys.executable, str(WORKER), "cpu", "refusals"], capture_output=True, text=True, timeout=240, env=environment()
    )
    _, incomplete, missing = result.stdout.split("rank 0 of 2 could not join")
    assert "MASTER_ADDR expected" in incomplete, result.stderr
    assert "over gloo within 2 s" in missing
    assert "torchrun" in incomplete
    assert "torchrun" in missing
    assert "already initialised with" in missing
    assert "this device needs 'gloo' for tensors on 'cpu'" in missing
