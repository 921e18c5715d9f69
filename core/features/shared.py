"""Features in this machine's shared memory: a directory of records on a file system that lives in memory.

Written once by the engine's process, mapped by the trainer's: one copy in all. The directory belongs to one run, is
readable by its user alone, and goes with its owner; what a killed owner left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from torchspec.core.errors import FeatureStoreError
from torchspec.core.features.directory import DirectoryStore

_NAME = re.compile(r"torchspec-features-(\d+)-(\d+)-\w+")


class SharedMemoryStore(DirectoryStore):
    """A `FeatureStore` that every process of this machine can open under its `root`.

    `SharedMemoryStore(capacity=...)` makes one, and closing it removes the directory; `SharedMemoryStore(root=...)`
    opens one that another process owns.
    """

    def __init__(self, *, root: Path | None = None, capacity: int | None = None) -> None:
        """FeatureStoreError when there is no shared memory, or none at `root`."""
        self._home = OwnedDirectory(root=root, capacity=capacity)
        super().__init__(self._home.root, capacity=capacity)

    def close(self) -> None:
        super().close()
        self._home.close()


class OwnedDirectory:
    """A directory in shared memory that goes with the process that made it, readable by its user alone.

    `OwnedDirectory()` makes one, and finds room for `capacity` bytes there; `OwnedDirectory(root=...)` is one that
    another process owns.
    """

    def __init__(self, *, root: Path | None = None, capacity: int | None = None) -> None:
        """FeatureStoreError when shared memory has less room than that, or nothing is at `root`."""
        self._held: int | None = None
        if root is None:
            base = memory_directory()
            _remove_orphans(base)
            _check_size(base, capacity)
            root = Path(tempfile.mkdtemp(prefix=f"torchspec-features-{os.getuid()}-{os.getpid()}-", dir=base))
            # A process number means nothing to another container that shares this memory; a lock does.
            self._held = os.open(root, os.O_RDONLY)
            fcntl.flock(self._held, fcntl.LOCK_EX)
        elif not root.is_dir():
            raise FeatureStoreError(
                f"there is no feature store at {root}: the process that owns it has ended, or runs on another machine"
            )
        self.root = root

    def close(self) -> None:
        """The owner's removes it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None
            shutil.rmtree(self.root, ignore_errors=True)


def memory_directory() -> Path:
    """Where Linux keeps shared memory (shm_overview(7)); elsewhere the directory of temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _check_size(base: Path, capacity: int | None) -> None:
    free = shutil.disk_usage(base).free
    if capacity is not None and capacity > free:
        raise FeatureStoreError(
            f"{base} has {free / 1e6:.0f} MB free and the feature store may take {capacity / 1e6:.0f} MB: give less "
            "to engine.store_mb, or more to the machine's shared memory (in a container: --shm-size)"
        )


def _remove_orphans(base: Path) -> None:
    """Stores of this user whose process is gone."""
    for path in base.glob("torchspec-features-*"):
        found = _NAME.fullmatch(path.name)
        if found and int(found[1]) == os.getuid() and not is_alive(int(found[2])) and not _locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path) -> bool:
    """By an owner, wherever it runs."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return True  # gone, or not ours to look at
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)
    return False


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
