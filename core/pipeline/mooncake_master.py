"""A Mooncake master of one's own: started, watched, started again on the same ports, and never left behind.

It listens at `host` alone, for RPC and metrics. No metadata server is started: that one would listen on every
interface whatever it is told, and forget with the master where living segments are; clients ask each other instead.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from torchspec.core.errors import FeatureStoreError, UnavailableError
from torchspec.core.features.mooncake import MooncakeSettings
from torchspec.core.pipeline.launch import LOOPBACK

log = logging.getLogger(__name__)

LOG = "mooncake_master.log"
POLL_SECONDS = 0.05
STOP_SECONDS = 5.0
TAIL_BYTES = 2000
# The system kills it when the thread that started it ends, however that comes (Linux); argv: our pid, then the command.
_TIED = (
    "import ctypes, os, signal, sys\n"
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))\n"
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])\n"
)


class MooncakeMaster:
    """`with MooncakeMaster(run_directory) as master: MooncakeStore(master.settings, namespace)`.

    `host`: the address that clients reach it at; from anywhere but loopback only on networks that may be trusted.
    What was stored is lost with a master that dies, and its clients' stores say so (StoreLostError). One that died
    more than `restarts` times, or that does not come up again within `timeout` seconds, is given up: see `failure`.
    """

    def __init__(self, directory: Path, *, host: str = LOOPBACK, timeout: float = 20.0, restarts: int = 10) -> None:
        """Returns when it answers. UnavailableError without Mooncake; FeatureStoreError with the end of its log."""
        if importlib.util.find_spec("mooncake") is None:
            raise UnavailableError('Mooncake is not installed: pip install "torchspec[mooncake]"')
        directory.mkdir(parents=True, exist_ok=True)
        self.log_file = directory / LOG
        self.failure: str | None = None
        self._host, self._timeout, self._restarts = host, timeout, restarts
        self._rpc_port, self._metrics_port = _free_ports(host)
        self._process: subprocess.Popen[bytes] | None = None
        self._closing, self._ready = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="mooncake-master", daemon=True)
        self._watcher.start()
        self._ready.wait()
        if self.failure is not None:
            raise FeatureStoreError(self.failure)

    @property
    def settings(self) -> MooncakeSettings:
        """For a client that only reads; a writer has `segment_bytes` too, and another machine its own `hostname`."""
        return MooncakeSettings(master=f"{self._host}:{self._rpc_port}", hostname=self._host)

    @property
    def pid(self) -> int:
        """Of the one that runs now."""
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        self._closing.set()
        self._watcher.join()

    def __enter__(self) -> MooncakeMaster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        """In the thread that lives as long as the master may."""
        deaths = 0
        try:
            while not self._closing.is_set():
                try:
                    self._start()
                except FeatureStoreError:
                    if not self._ready.is_set():
                        raise  # the first one: it will not do better
                self._ready.set()
                while self._alive():
                    if self._closing.wait(POLL_SECONDS):
                        return
                deaths += 1
                self._end()
                log.warning("the Mooncake master died%s", self._tail())
                if deaths > self._restarts:
                    raise FeatureStoreError(f"the Mooncake master died {deaths} times: it is not started again")
        except (FeatureStoreError, OSError) as error:
            self.failure = f"{error}{self._tail()}"
            log.error("%s", error)
        finally:
            self._end()
            self._ready.set()

    def _start(self) -> None:
        command = [
            sys.executable, "-P", "-m", "mooncake.cli",
            f"--rpc_address={self._host}", f"--rpc_port={self._rpc_port}",
            f"--metrics_host={self._host}", f"--metrics_port={self._metrics_port}",
            "--logtostderr", "--minloglevel=1",
        ]  # fmt: skip
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _TIED, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for those who use it: it ends after them
            )
        until = time.monotonic() + self._timeout
        while not self._answers():
            if not self._alive():
                raise FeatureStoreError(f"the Mooncake master ended while it started; its log is {self.log_file}")
            if time.monotonic() > until:
                raise FeatureStoreError(f"the Mooncake master did not answer within {self._timeout:.0f} s")
            if self._closing.wait(POLL_SECONDS):
                return

    def _answers(self) -> bool:
        """It says itself that it serves: at its port may be another process, which it will fail to take it from."""
        connection = HTTPConnection(self._host, self._metrics_port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return bool(json.loads(connection.getresponse().read())["service_ready"]) and self._alive()
        except (OSError, HTTPException, ValueError, KeyError):
            return False
        finally:
            connection.close()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        try:
            text = self.log_file.read_bytes()[-TAIL_BYTES:].decode(errors="replace").rstrip()
        except OSError:
            return ""
        return f"; its log {self.log_file} ends with\n{text}" if text else ""


def _free_ports(host: str) -> tuple[int, int]:
    """Held until both are known, so that they differ."""
    with socket.socket() as first, socket.socket() as second:
        first.bind((host, 0))
        second.bind((host, 0))
        return first.getsockname()[1], second.getsockname()[1]
