"""Memory that is registered with a transport once and used many times.

A region is leased as a tensor and comes back by itself when nothing of that tensor is left, so what is read into it
need not be copied out. Fresh memory would cost its page faults (and a transport that pins pages, their pinning) for
every record.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 2 << 20
"""Bytes; the most that a transport asks for."""
GRAIN = 64 << 10
IDLE_SECONDS = 60.0


@dataclass(eq=False)
class _Region:
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]]
    idle_since: float = field(default_factory=time.monotonic)


class Regions:
    """`register` takes an address and a number of bytes, `unregister` the address. Of what is idle, `keep_bytes` are
    kept at most, and nothing that was idle for a minute.
    """

    def __init__(
        self, register: Callable[[int, int], None], unregister: Callable[[int], object], *, keep_bytes: int
    ) -> None:
        self._register, self._unregister, self._keep_bytes = register, unregister, keep_bytes
        self._idle: list[_Region] = []
        self._returned: deque[_Region] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def lease(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], its content arbitrary. It is the lessee's until the last view of it is gone."""
        with self._lock:
            self._collect()
            fitting = [region for region in self._idle if nbytes <= len(region.memory) <= 2 * nbytes + GRAIN]
            region = min(fitting, key=lambda each: len(each.memory), default=None)
            if region is not None:
                self._idle.remove(region)
        if region is None:
            region = self._allocate(nbytes)
        view = region.memory[:nbytes]  # the tensor's storage holds this object, and all its views hold the storage
        weakref.finalize(view, self._give_back, region).atexit = False
        return torch.from_numpy(view)

    def idle_bytes(self) -> int:
        with self._lock:
            self._collect()
            return sum(len(region.memory) for region in self._idle)

    def close(self) -> None:
        """Tensors that are still leased stay valid; they are only registered no more."""
        with self._lock:
            self._closed = True
            self._collect()

    def _allocate(self, nbytes: int) -> _Region:
        size = -(-nbytes // GRAIN) * GRAIN
        alignment = ALIGNMENT if size >= ALIGNMENT else 4096
        memory = np.empty(size + alignment, dtype=np.uint8)
        start = -memory.ctypes.data % alignment
        memory = memory[start : start + size]
        self._register(memory.ctypes.data, size)
        return _Region(memory=memory)

    def _give_back(self, region: _Region) -> None:
        """Runs wherever the last view dies, in the middle of anything: it takes no lock."""
        if not self._closed:
            region.idle_since = time.monotonic()
            self._returned.append(region)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        self._idle.sort(key=lambda region: region.idle_since)
        total = sum(len(region.memory) for region in self._idle)
        oldest = 0.0 if self._closed else time.monotonic() - IDLE_SECONDS
        while self._idle and (self._closed or total > self._keep_bytes or self._idle[0].idle_since < oldest):
            region = self._idle.pop(0)
            total -= len(region.memory)
            self._unregister(region.memory.ctypes.data)
