"""Captures that several callers may share: who asks first has it made, and the others take their parts of it.

Ranks that share a sequence each ask for the same sample and another part of its rows. None of them waits for a rank
that asks late, or for one that never does: what is left of a record is dropped when its time is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torchspec.core.errors import FeatureStoreError
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import RecordRef
from torchspec.core.workers.activity import Activity
from torchspec.core.workers.runner import Landing


@dataclass
class Capture:
    """Of one sample. `left`: callers who have not taken their part. `until`: when nobody may come any more."""

    request: CaptureRequest
    future: Future[None]
    left: int
    until: float


class Captures:
    """`begin` has samples captured, into `landing`, and returns at once."""

    def __init__(
        self, begin: Callable[[Sequence[CaptureRequest]], list[Future[None]]], landing: Landing | None
    ) -> None:
        self._begin, self._landing = begin, landing
        self.activity = Activity()
        self._known: dict[str, Capture] = {}
        self._lock = threading.Lock()

    def enter(self, requests: Sequence[CaptureRequest], until: float) -> list[Capture]:
        """One for each request, made together where they are new. Callers leave all of them by `leave`."""
        with self._lock:
            self._sweep()
            new = [request for request in requests if request.record_id not in self._known]
            for request, future in zip(new, self._begin(new) if new else [], strict=True):
                self.activity.follow(future, partial(_tokens_of, request))
                callers = max(1, len(request.parts))
                self._known[request.record_id] = Capture(request=request, future=future, left=callers, until=until)
            found = [self._known[request.record_id] for request in requests]
            for capture in found:
                capture.until = max(capture.until, until)
        return found

    def leave(self, capture: Capture, *, keep: bool = False) -> None:
        """The caller needs it no more; with the last one it goes. `keep`: its record is the caller's from now on."""
        with self._lock:
            capture.left -= 1
            if capture.left == 0:
                self._known.pop(capture.request.record_id, None)
                if not keep:
                    self._drop(capture)

    def _sweep(self) -> None:
        now = time.monotonic()
        for record_id, capture in list(self._known.items()):
            if capture.until < now:
                del self._known[record_id]
                self._drop(capture)

    def _drop(self, capture: Capture) -> None:
        """Its record, now or when it is written after all."""
        capture.future.cancel()
        capture.future.add_done_callback(lambda _: self._remove(capture.request.record_id))

    def _remove(self, record_id: str) -> None:
        if self._landing is not None:
            with suppress(FeatureStoreError, RuntimeError):
                self._landing.remove(self._landing.find(record_id))

    def ref(self, capture: Capture) -> RecordRef:
        """Of a finished one."""
        assert self._landing is not None
        return self._landing.find(capture.request.record_id)


def _tokens_of(request: CaptureRequest, _: None) -> int:
    return len(request.input_ids)
