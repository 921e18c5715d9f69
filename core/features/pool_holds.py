"""Which buffers of a pool are being read, and by whom: marks in its directory, under a lock that dies with its process.

A reader marks a buffer and then looks whether the record is still there; the owner sees that a record is gone and then
looks for marks. Whichever comes first, a buffer that is being read is never taken for a free one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import weakref
from collections.abc import Callable
from pathlib import Path

MARKS, READERS = "marks", "readers"


class Reader:
    """This process among those that read from the pool at `root`; its lock lasts until its last hold is let go."""

    def __init__(self, root: Path) -> None:
        self._marks = root / MARKS
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        path = root / READERS / self._name
        aside = path.with_name(f".{self._name}")
        lock = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        aside.rename(path)  # seen only when it is locked
        weakref.finalize(self, _leave, path, lock).atexit = False  # the kernel takes the lock from a process that ends

    def hold(self, buffer: int) -> Callable[[], None]:
        """Mark a buffer -> what lets it go, which may be called more than once and from any thread."""
        mark = self._marks / f"{buffer}.{self._name}.{next(self._numbers)}"
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

        def let_go(_reader: Reader = self) -> None:  # keeps the lock
            mark.unlink(missing_ok=True)

        return let_go


def held(root: Path) -> set[int]:
    """The numbers of the buffers that are marked."""
    return {int(name.partition(".")[0]) for name in os.listdir(root / MARKS)}


def forget_the_dead(root: Path) -> None:
    """Remove the marks of processes that ended without letting go."""
    for path in (root / READERS).iterdir():
        if path.name.startswith(".") or _lives(path):
            continue
        for mark in (root / MARKS).glob(f"*.{path.name}.*"):
            mark.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _leave(path: Path, lock: int) -> None:
    path.unlink(missing_ok=True)
    os.close(lock)


def _lives(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it left meanwhile, and took its marks along
        opened = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(opened)
    return False
