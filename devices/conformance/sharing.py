"""Checks of `SharedMemory`, or that there is none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torchspec.core.conformance.checks import Check
from torchspec.devices.api import SharedMemory
from torchspec.devices.conformance.subject import Subject, subject_of

NBYTES = 3 << 20
SECONDS = 90

_READER = "from torchspec.devices.conformance.sharing import read; import sys; read(*sys.argv[1:])"


def read(name: str, handle: str) -> None:
    """The other process: opens the buffer three times, as often as one likes, prints its sum, and writes into it."""
    memory = subject_of(name).device.shared_memory
    assert memory is not None
    for _ in range(3):
        opened_U = memory.open(handle)
        total = int(opened_U.cpu().long().sum())
        memory.synchronize()
        del opened_U
    opened_U = memory.open(handle)
    opened_U[-1] = 9
    memory.synchronize()
    del opened_U
    print(total)


def another_process(subject: Subject) -> str:
    memory = subject.device.shared_memory
    if memory is None:
        return "declared absent: features go through the host"
    assert memory.device_type == subject.spec.device_type, f"it holds memory of {memory.device_type!r}"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        held_U, handle = memory.allocate(NBYTES, Path(folder))
        assert (held_U.dtype, tuple(held_U.shape)) == (torch.uint8, (NBYTES,)), "not uint8 [nbytes]"
        assert held_U.device == subject.where, f"the buffer lies on {held_U.device}, not {subject.where}"
        assert handle.isprintable(), "the handle is no printable text"
        held_U.fill_(7)
        memory.synchronize()
        command = [sys.executable, "-P", "-c", _READER, subject.spec.name, handle]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, f"another process cannot open it: {done.stderr.strip()[-300:]}"
        assert int(done.stdout) == 7 * NBYTES, "another process reads other bytes"
        memory.synchronize()
        assert int(held_U[-1]) == 9, "what another process writes is not seen: it was given a copy"
        here_U = memory.open(handle)
        assert int(here_U[0]) == 7, "the process that shares it reads other bytes"
        del held_U, here_U
        memory.release(handle)
        _check_unknown(memory, handle)
        assert not list(Path(folder).iterdir()), "released memory leaves a file behind"
    _check_released(subject, memory)
    return f"{NBYTES >> 20} MiB, opened five times, and given back"


def _check_unknown(memory: SharedMemory, released: str) -> None:
    for handle in (released + "x", "no handle at all"):
        try:
            memory.open(handle)
        except (OSError, ValueError, RuntimeError):
            continue
        raise AssertionError(f"a handle of nothing can be opened: {handle[:60]!r}")


def _check_released(subject: Subject, memory: SharedMemory) -> None:
    """What was released is free again."""
    before = subject.device.runtime.memory().allocated
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for _ in range(8):
            held_U, handle = memory.allocate(64 << 20, Path(folder))
            held_U.fill_(1)
            memory.synchronize()
            del held_U
            memory.release(handle)
    grown = subject.device.runtime.memory().allocated - before
    assert grown < 128 << 20, f"{grown} bytes of 8 released buffers of {64 << 20} are still allocated"


SHARING = (Check("sharing: with another process", another_process),)
