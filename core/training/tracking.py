"""Trackers beside the training, each in a thread of its own: no step waits for one, and none can stop a run.

A row that a tracker cannot take is lost to it and counted; metrics.jsonl has all of them. What went wrong is said once
for each tracker, and at the end how much it missed. Rank 0 only.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchspec.core.config.secrets import hidden
from torchspec.core.interfaces.tracker import Result, TrackedRun, Tracker, TrackerSpec

logger = logging.getLogger(__name__)

ROWS_WAITING = 10_000
"""For a tracker that is slower than the run, or not there yet: some 20 MB."""
BETWEEN_ATTEMPTS = 60.0
"""Seconds, to open a tracker that could not be opened."""
PATIENCE = 30.0
"""Seconds at the end, for everything that still waits: of all trackers together."""

Order = Callable[[Tracker], None]


class Tracking:
    """The trackers of a run, as one."""

    def __init__(self, specs: Sequence[TrackerSpec], run: TrackedRun, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._followers = [_Follower(spec, run) for spec in specs]

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl. Returns at once."""
        step, values = int(row["step"]), scalars(row)
        for follower in self._followers:
            follower.order(lambda tracker: tracker.log(step, values))

    def results(self, values: Mapping[str, Result]) -> None:
        """Returns at once."""
        for follower in self._followers:
            follower.order(lambda tracker: tracker.results(values))

    def close(self) -> None:
        """Wait for what is on its way, but not for ever."""
        until = time.monotonic() + self._patience
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            follower.wait(max(0.0, until - time.monotonic()))


class _Follower:
    """One tracker and its thread, which dies with the process if the tracker never returns."""

    def __init__(self, spec: TrackerSpec, run: TrackedRun) -> None:
        self._spec, self._run = spec, run
        self._orders: queue.Queue[Order] = queue.Queue(ROWS_WAITING)
        self._ending = threading.Event()
        self._failed = False
        self._lost = self._refused = 0  # by its thread, and by the run's
        self._thread = threading.Thread(target=self._follow, name=f"tracker-{spec.name}", daemon=True)
        self._thread.start()

    def order(self, order: Order) -> None:
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            self._refused += 1
            self._complain("it is too slow or does not answer")

    def end(self) -> None:
        self._ending.set()

    def wait(self, seconds: float) -> None:
        """Until it has ended, and say what it missed."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._complain("it has not finished, and is not waited for any longer")
        lost = self._lost + self._refused + self._orders.qsize()
        if lost:
            logger.warning("tracker %s missed %d rows; metrics.jsonl has them all", self._spec.name, lost)

    def _follow(self) -> None:
        tracker = self._opened()
        if tracker is None:
            return
        while not (self._ending.is_set() and self._orders.empty()):
            try:
                order = self._orders.get(timeout=0.1)
            except queue.Empty:
                continue
            self._lost += not self._attempt(lambda order=order: order(tracker))  # type: ignore[misc]
        self._attempt(tracker.close)

    def _opened(self) -> Tracker | None:
        """Tried again until the run ends; rows wait meanwhile."""
        opened: list[Tracker] = []
        while not self._attempt(lambda: opened.append(self._spec.open(self._run))):
            if self._ending.wait(BETWEEN_ATTEMPTS):
                return None
        return opened[0]

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (Exception, SystemExit) as error:  # somebody else's software and network; it is said  # noqa: BLE001
            self._complain(f"{type(error).__name__}: {error}")
            return False
        return True

    def _complain(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("tracker %s: %s; nothing else is affected", self._spec.name, hidden(why))


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row as `kind/name`; of a list one per position, from 1; of an object by their path."""
    named = (pair for name, value in row.items() if name != "step" for pair in _numbers(name, value))
    return {f"{row['kind']}/{name}": number for name, number in named}


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _numbers(f"{name}.{key}", inner)]
    if isinstance(value, list | tuple):
        return [pair for place, inner in enumerate(value, 1) for pair in _numbers(f"{name}/{place}", inner)]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return [(name, float(value))] if number else []
