"""How much of its time an engine works: for whoever wants to know which side of a pipeline waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


class Activity:
    """Of captures and texts. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._working = 0
        self._busy_from = 0.0
        self._busy = 0.0
        self._tokens = 0

    def follow(self, work: Future[Result], tokens: Callable[[Result], int]) -> None:
        """It works from now on until `work` is done, which then was so many tokens."""

        def done(work: Future[Result]) -> None:
            failed = work.cancelled() or work.exception() is not None
            self.end(0 if failed else tokens(work.result()))

        self.begin()
        work.add_done_callback(done)

    def begin(self) -> None:
        with self._lock:
            if self._working == 0:
                self._busy_from = time.monotonic()
            self._working += 1

    def end(self, tokens: int) -> None:
        """Of one that was begun; 0 tokens if it came to nothing."""
        with self._lock:
            self._working -= 1
            self._tokens += tokens
            if self._working == 0:
                self._busy += time.monotonic() - self._busy_from

    def told(self) -> dict[str, float]:
        """Since the start: seconds, those with work, and tokens captured or written."""
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._busy_from if self._working else 0.0)
            return {"seconds": now - self._since, "busy_seconds": busy, "tokens": self._tokens}
