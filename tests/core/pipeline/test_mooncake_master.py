"""A real master: started, killed, started again, left by its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspec.core.errors import FeatureStoreError
from torchspec.core.pipeline import mooncake_master
from torchspec.core.pipeline.mooncake_master import MooncakeMaster

pytest.importorskip("mooncake.store", exc_type=ImportError, reason='pip install "torchspec[mooncake]"')


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal as the kernel shows them, that a process listens on."""
    sockets = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # a connection that was closed meanwhile
            sockets.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def test_it_answers_on_loopback_alone_and_goes_when_closed(tmp_path: Path) -> None:
    with MooncakeMaster(tmp_path) as master:
        pid, address = master.pid, master.settings.master
        assert answers(address)
        assert listening(pid) == {"0100007F"}
    assert not runs(pid)
    assert not answers(address)


def test_one_that_dies_is_started_again_on_the_same_port_but_not_for_ever(tmp_path: Path) -> None:
    with MooncakeMaster(tmp_path, restarts=1) as master:
        first, address = master.pid, master.settings.master
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: master.pid != first and answers(address))
        assert master.settings.master == address
        os.kill(master.pid, signal.SIGKILL)
        wait_for(lambda: master.failure is not None)
        assert "died 2 times" in str(master.failure)
        assert not answers(address)


def test_it_dies_with_a_killed_owner(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from torchspec.core.pipeline.mooncake_master import MooncakeMaster\n"
        "print(MooncakeMaster(pathlib.Path(sys.argv[1])).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert runs(pid)
        owner.kill()
    wait_for(lambda: not runs(pid))


def test_one_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(mooncake_master, "_free_ports", lambda host: (port, port))
        with pytest.raises(
            FeatureStoreError, match=r"(?s)the Mooncake master ended .*mooncake_master.log ends with\n.+"
        ):
            MooncakeMaster(tmp_path, timeout=10)
