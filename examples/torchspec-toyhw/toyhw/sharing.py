"""Device memory that other processes can open: files in the host's memory."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from torch import Tensor

from toyhw import _C


class ToySharedMemory:
    """torchspec's `SharedMemory`; a handle is the file's path. As on most hardware, readers copy and let go."""

    device_type = "toyhw"
    reads_in_place = False

    def allocate(self, nbytes: int, directory: Path) -> tuple[Tensor, str]:
        path = directory / f"{secrets.token_hex(8)}.toyhw"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            path.unlink()
            if error.errno == errno.ENOSPC:
                raise MemoryError(f"{directory} has no {nbytes / 1e6:.1f} MB left") from error
            raise
        finally:
            os.close(file)
        return _C.map_file(str(path)), str(path)

    def open(self, handle: str) -> Tensor:
        return _C.map_file(handle)

    def release(self, handle: str) -> None:
        Path(handle).unlink()

    def synchronize(self) -> None:
        """A copy has been made when it returns."""
