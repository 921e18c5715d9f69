"""Features handed from one process of a machine to others through buffers that are used again and again.

A fresh page costs a fault and a clearing in each process that touches it, more than copying what it holds. A pool pays
that once: a record is copied into a buffer that has been used before, and read where it lies.

The pool's directory holds a small file for each record, which appears whole: a line of JSON, then the ids and the row
sums. It belongs to one run, is readable by its user alone and goes with its owner; what a killed owner left behind, the
next one removes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError, StoreFullError
from torchspec.core.features.checks import check_features
from torchspec.core.features.directory import file_name
from torchspec.core.features.pool_buffers import RECORDS, Buffer, Buffers
from torchspec.core.features.pool_holds import MARKS, READERS, Reader
from torchspec.core.features.pool_records import FORMAT, Record, fill, record_bytes, written
from torchspec.core.features.shared import OwnedDirectory
from torchspec.core.interfaces.device import SharedMemory
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage

_ABOUT = "pool.json"
_MOST_MAPPED = 1024  # Linux maps at most 65530 regions for a process (vm.max_map_count)
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class PooledStore:
    """A `FeatureStore` for the processes of one machine. Its owner puts; every process takes out and removes.

    `PooledStore(memory, capacity=...)` makes a pool of at most so many bytes and owns it, and closing it removes it;
    `PooledStore(memory, root=...)` opens one that another process owns, with the same kind of `memory`.

    Where `memory.reads_in_place`, features taken out lie in the pool and must not be written: their buffer is free
    when the record is removed and the last tensor over it is gone, or the process that had it. Elsewhere they are a
    copy: an accelerator's kernels may still read what a host no longer refers to, and the memory of another process
    must be let go before that process frees it.

    What `get` verifies: the record's own file in full (ids, facts, row sums, checksum), the buffer's generation, and
    the content of 16 rows spread over the record, first and last included. To sum up all of them costs half as much as
    the copy, and finds what memory of one machine does not do: change by itself.
    """

    def __init__(self, memory: SharedMemory, *, root: Path | None = None, capacity: int | None = None) -> None:
        """FeatureStoreError when there is no shared memory, no pool at `root`, or one of another kind of memory."""
        if (root is None) == (capacity is None):
            raise ValueError("a pool is either made with a capacity or opened at its root")
        on_host = memory.device_type == "cpu"
        # Also the buffers' place, where the device shares memory as files.
        self._home = OwnedDirectory(root=root, capacity=capacity if on_host else None)
        self.root = self._home.root
        self._memory = memory
        self._buffers: Buffers | None = None
        if capacity is not None:
            for name in (RECORDS, MARKS, READERS):
                (self.root / name).mkdir(mode=0o700)
            (self.root / _ABOUT).write_text(json.dumps({"format": FORMAT, "device_type": memory.device_type}))
            self._buffers = Buffers(memory, self.root, capacity)
        else:
            self._check_kind()
        self._lock = threading.Lock()
        self._writing: set[str] = set()
        self._mapped: OrderedDict[str, Tensor] = OrderedDict()
        self._reader: Reader | None = Reader(self.root)

    @property
    def allocated(self) -> int:
        """Bytes of all buffers, free ones included; of its owner alone."""
        with self._lock:
            return self._owned().allocated

    def put(self, record_id: str, features: Features) -> RecordRef:
        """One copy. RuntimeError in a process that does not own the pool."""
        self._open_reader()
        buffers = self._owned()
        check_features(record_id, features)
        name = file_name(record_id)
        path = self.root / RECORDS / name
        with self._lock:
            if name in self._writing or path.exists():
                raise ValueError(f"record {record_id!r} is already stored in {self.root}: remove it before")
            buffers.forget(name)
            try:
                buffer = buffers.take(record_bytes(features))
            except StoreFullError as error:
                raise StoreFullError(f"record {record_id!r}: {error}") from error
            self._writing.add(name)
        try:
            ref = self._write(path, record_id, features, buffer)
        except BaseException:
            with self._lock:
                buffers.give(buffer)
            raise
        finally:
            with self._lock:
                self._writing.discard(name)
        return ref

    def get(self, ref: RecordRef) -> Features:
        reader = self._open_reader()
        path = self._path(ref)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise self._missing(ref) from None
        with file:
            try:
                record = Record.of(file.read())
                let_go = reader.hold(record.buffer)
            except _UNREADABLE as error:
                raise self._unreadable(ref, path, error) from error
            try:
                if os.fstat(file.fileno()).st_nlink == 0:
                    raise self._missing(ref)
                record.check(ref, path)
                features = self._read(record, let_go)
                record.check_content(features, path)
            except BaseException as error:
                let_go()
                if isinstance(error, _UNREADABLE):
                    raise self._unreadable(ref, path, error) from error
                raise
        return features

    def remove(self, ref: RecordRef) -> None:
        self._open_reader()
        try:
            self._path(ref).unlink()
        except FileNotFoundError:
            raise self._missing(ref) from None

    def usage(self) -> StoreUsage:
        """Records that can be taken out; what is held of removed ones is not counted."""
        self._open_reader()
        sizes = []
        for path in (self.root / RECORDS).iterdir():
            try:
                with path.open("rb") as file:
                    sizes.append(int(json.loads(file.readline())["nbytes"]))
            except FileNotFoundError:
                continue  # removed meanwhile
            except _UNREADABLE:
                sizes.append(0)  # `get` says that it is damaged
        return StoreUsage(records=len(sizes), nbytes=sum(sizes))

    def wait_for_room(self, nbytes: int, deadline: float) -> None:
        """Return when a record of so many bytes (`record_bytes`) would fit; StoreFullError at `deadline`, a time of
        time.monotonic(), or when it never will. Nothing is reserved."""
        pause = 0.001
        while True:
            self._open_reader()
            with self._lock:
                if self._owned().fits(nbytes):
                    return
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreFullError(
                    f"no room for {nbytes / 1e6:.1f} MB in the feature store {self.root}: what it holds was not taken "
                    "out in time"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)

    def close(self) -> None:
        """Features taken out stay valid."""
        if self._reader is None:
            return
        self._reader = None
        with self._lock:
            self._mapped.clear()
            if self._buffers is not None:
                self._buffers.close()
        self._home.close()

    def _write(self, path: Path, record_id: str, features: Features, buffer: Buffer) -> RecordRef:
        sums_R = fill(buffer, features)
        self._memory.synchronize()
        content, digest = written(record_id, buffer, features, sums_R)
        aside = self.root / f"{secrets.token_hex(8)}.aside"
        try:
            aside.write_bytes(content)
            with self._lock:
                buffer.record = path.name
                aside.rename(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StoreFullError(f"no room for record {record_id!r} in {self.root}: {error.strerror}") from error
            raise
        finally:
            aside.unlink(missing_ok=True)
        return RecordRef(record_id=record_id, length=len(features.last_TH), checksum=digest)

    def _read(self, record: Record, let_go: Callable[[], None]) -> Features:
        if self._memory.reads_in_place:
            lies = self._mapping(record.handle).numpy()  # a new array, which the tensors over it keep alive
            weakref.finalize(lies, let_go).atexit = False
            return record.features(torch.from_numpy(lies))
        opened_U = self._memory.open(record.handle)
        features = record.features(opened_U.clone())
        self._memory.synchronize()
        del opened_U
        let_go()
        return features

    def _mapping(self, handle: str) -> Tensor:
        """Kept, with its pages: an unused one of a buffer that the owner gave up costs addresses, not memory."""
        with self._lock:
            if handle not in self._mapped:
                self._mapped[handle] = self._memory.open(handle)
            self._mapped.move_to_end(handle)
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
            return self._mapped[handle]

    def _check_kind(self) -> None:
        try:
            about = json.loads((self.root / _ABOUT).read_text())
            kind = (about["format"], about["device_type"])
        except _UNREADABLE as error:
            raise FeatureStoreError(f"{self.root} is not a pool of features: {error}") from error
        if kind != (FORMAT, self._memory.device_type):
            raise FeatureStoreError(
                f"the pool of features {self.root} has format {kind[0]} and lies in memory of {kind[1]}; this process "
                f"reads format {FORMAT} and memory of {self._memory.device_type}"
            )

    def _path(self, ref: RecordRef) -> Path:
        return self.root / RECORDS / file_name(ref.record_id)

    def _open_reader(self) -> Reader:
        if self._reader is None:
            raise RuntimeError(f"the feature store {self.root} is closed")
        return self._reader

    def _owned(self) -> Buffers:
        if self._buffers is None:
            raise RuntimeError(f"the feature store {self.root} belongs to another process, which alone puts records")
        return self._buffers

    def _missing(self, ref: RecordRef) -> MissingRecordError:
        return MissingRecordError(
            f"record {ref.record_id!r} is not in the feature store {self.root}: never captured, or already taken"
        )

    def _unreadable(self, ref: RecordRef, path: Path, error: Exception) -> DamagedRecordError:
        return DamagedRecordError(f"record {ref.record_id!r} in {path} cannot be read: {error}")
