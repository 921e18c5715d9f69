"""CUDA's Multi-Process Service for one run: kernels of engine and trainer run side by side instead of by time slices.

A daemon of its own in a directory of its own, so that it is no other run's: `CUDA_MPS_PIPE_DIRECTORY` says to a process
which daemon it is a client of. Between it and this process stands a guard (`python -m torchspec.devices.cuda.mps`),
which ends it when its own standard input ends: the daemon never outlives whoever started it.

Source of the commands: NVIDIA, Multi-Process Service (docs.nvidia.com/deploy/mps), release 560. Never run on a GPU:
what is tested is this file against a program of the daemon's name.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torchspec.devices.api import Availability, UnavailableError, environment_with, is_set

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
READY = "ready"
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 20.0, 10.0, 0.1


class CudaMps:
    """Implements `Multiplexer`."""

    def available(self) -> Availability:
        if is_set(PIPES):
            return Availability(ok=False, reason=f"{PIPES} is set, and what is there is used")
        if shutil.which(CONTROL) is None:
            return Availability(ok=False, reason=f"{CONTROL} is not on the path", hint="it comes with NVIDIA's driver")
        return Availability(ok=True)

    def environment(self, directory: Path) -> Mapping[str, str]:
        return {PIPES: str(directory), LOGS: str(directory)}

    def start(self, directory: Path) -> Callable[[], None]:
        guard = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for those who use it: it ends after them
        )
        assert guard.stdin is not None
        assert guard.stdout is not None
        pipe, said = guard.stdin, guard.stdout.readline().strip()

        def stop() -> None:
            pipe.close()
            try:
                guard.wait(4 * STOP_SECONDS)  # it may need two of them itself, and one to look around
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()

        if said != READY:
            stop()
            raise UnavailableError(said or f"the guard of {CONTROL} ended at once")
        return stop


def guard(directory: Path) -> int:
    """The daemon until standard input ends; 1 with the reason on standard output when it does not start."""
    environment = environment_with(CudaMps().environment(directory))
    try:
        daemon = subprocess.Popen(
            [CONTROL, "-f"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        print(f"{CONTROL}: {error.strerror}", flush=True)
        return 1
    try:
        until = time.monotonic() + START_SECONDS
        while not _told("get_server_list", environment):
            if daemon.poll() is not None:
                print(f"{CONTROL} ended while it started (exit code {daemon.returncode}), see {directory}", flush=True)
                return 1
            if time.monotonic() > until:
                print(f"{CONTROL} did not answer within {START_SECONDS:.0f} s, see {directory}", flush=True)
                return 1
            time.sleep(POLL_SECONDS)
        print(READY, flush=True)
        sys.stdin.buffer.read()
        return 0
    finally:
        if daemon.poll() is None:
            _told("quit", environment)
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def _told(order: str, environment: Mapping[str, str]) -> bool:
    """Whether the daemon took it."""
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{order}\n".encode(),
            env=environment,
            capture_output=True,
            timeout=STOP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(guard(Path(sys.argv[1])))
