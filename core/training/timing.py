"""Where a step's time goes, without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds per named phase of one step.

    On a CPU a phase is wall time. On an accelerator, whose work runs behind the host, a phase lies between two events
    of the current stream; they are read in `finish`, after the step's one synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.Event, torch.Event]] = []
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._device.type == "cpu":
            start = time.perf_counter()
            yield
            self._host[name] = self._host.get(name, 0.0) + time.perf_counter() - start
            return
        before = torch.Event(device=self._device, enable_timing=True)
        after = torch.Event(device=self._device, enable_timing=True)
        before.record()
        yield
        after.record()
        self._events.append((name, before, after))

    def finish(self) -> tuple[dict[str, float], float]:
        """({phase: seconds, ..., "other": the rest}, wall seconds of the whole step)."""
        whole = time.perf_counter() - self._started
        phases = dict(self._host)
        for name, before, after in self._events:
            after.synchronize()
            phases[name] = phases.get(name, 0.0) + before.elapsed_time(after) / 1000.0
        phases["other"] = max(whole - sum(phases.values()), 0.0)
        return phases, whole
