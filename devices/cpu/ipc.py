"""Memory of the host that other processes can map: files in a directory of a file system that lives in memory."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

_AT_ONCE = getattr(mmap, "MAP_POPULATE", 0)  # one call for all pages and not a fault for each


class CpuSharedMemory:
    """Implements `SharedMemory`; a handle is the file's path. A file costs nothing once it is released, even where
    another process has it mapped: its pages are taken out of it before it is removed (madvise(2), MADV_REMOVE)."""

    device_type = "cpu"
    reads_in_place = True

    def __init__(self) -> None:
        self._mapped: dict[str, mmap.mmap] = {}

    def allocate(self, nbytes: int, directory: Path) -> tuple[Tensor, str]:
        path = directory / f"{secrets.token_hex(8)}.memory"
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(opened, nbytes)
            mapped = _map(opened, nbytes)
        except OSError as error:
            path.unlink()
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise MemoryError(f"{directory} has no {nbytes / 1e6:.1f} MB left: {error.strerror}") from error
            raise
        finally:
            os.close(opened)
        self._mapped[str(path)] = mapped
        return torch.frombuffer(mapped, dtype=torch.uint8), str(path)

    def open(self, handle: str) -> Tensor:
        opened = os.open(handle, os.O_RDWR)
        try:
            mapped = _map(opened, os.fstat(opened).st_size)
        finally:
            os.close(opened)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def release(self, handle: str) -> None:
        mapped = self._mapped.pop(handle)
        if hasattr(mmap, "MADV_REMOVE"):
            mapped.madvise(mmap.MADV_REMOVE)
        Path(handle).unlink(missing_ok=True)

    def synchronize(self) -> None:
        """A copy has been made when it returns."""


def _reserve(opened: int, nbytes: int) -> None:
    """A file with holes would end the process that writes into one where no memory is left (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(opened, 0, nbytes)
    else:
        os.truncate(opened, nbytes)


def _map(opened: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(opened, nbytes, flags=mmap.MAP_SHARED | _AT_ONCE)
