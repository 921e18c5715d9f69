"""Bounding what waits in the store: work is admitted when its records will fit beside those that nobody took yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torchspec.core.errors import StoreFullError
from torchspec.core.interfaces.features import FeatureStore

_POLL_SECONDS = 0.02


class Admission:
    """First come, first served; all of a request at once, so that two halves never wait for each other."""

    def __init__(self, store: FeatureStore, capacity: int) -> None:
        self.store, self.capacity = store, capacity
        self._turn = threading.Lock()  # held by whoever is next; the others queue for it
        self._coming = 0
        self._counting = threading.Lock()

    @contextmanager
    def room_for(self, nbytes: int, deadline: float) -> Iterator[None]:
        """Wait for room until `time.monotonic()` reaches the deadline; StoreFullError then, or if it can never fit."""
        if nbytes > self.capacity:
            raise StoreFullError(
                f"the features asked for take {nbytes / 1e6:.1f} MB and the store may hold {self.capacity / 1e6:.1f} "
                "MB: raise engine.store_mb, or ask for fewer or shorter samples at a time"
            )
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._too_late(nbytes)
        try:
            while not self._admit(nbytes):
                if time.monotonic() > deadline:
                    raise self._too_late(nbytes)
                time.sleep(_POLL_SECONDS)
        finally:
            self._turn.release()
        try:
            yield
        finally:
            with self._counting:
                self._coming -= nbytes

    def _admit(self, nbytes: int) -> bool:
        # Records of admitted work count twice between their writing and the end of the request: on the safe side.
        with self._counting:
            if self._held() + self._coming + nbytes > self.capacity:
                return False
            self._coming += nbytes
            return True

    def _held(self) -> int:
        return self.store.usage().nbytes

    def _too_late(self, nbytes: int) -> StoreFullError:
        return StoreFullError(
            f"no room for {nbytes / 1e6:.1f} MB of features in time: {self._held() / 1e6:.1f} MB of "
            f"{self.capacity / 1e6:.1f} MB wait in the store to be taken"
        )
