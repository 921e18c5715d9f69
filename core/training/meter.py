"""What engines are doing, asked for beside the training: nothing waits for the answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from torchspec.core.errors import TorchspecError
from torchspec.core.interfaces.engine import EngineUsage, StreamedEngine

EVERY_SECONDS = 2.0


class Meter:
    """Rates between two answers of each engine."""

    def __init__(self, engines: Sequence[StreamedEngine]) -> None:
        self._engines = engines
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meter")
        self._asked: Future[None] | None = None
        self._asked_at = 0.0
        self._last: list[EngineUsage | None] = [None] * len(engines)
        self._rates: list[dict[str, float]] = [{} for _ in engines]

    def look(self) -> None:
        """Ask now and then; returns at once."""
        now = time.monotonic()
        if now - self._asked_at > EVERY_SECONDS and (self._asked is None or self._asked.done()):
            self._asked_at = now
            self._asked = self._thread.submit(self._ask)

    def rates(self) -> tuple[dict[str, float], ...]:
        """Of those that have answered twice since they started."""
        return tuple(rates for rates in self._rates if rates)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> None:
        for number, engine in enumerate(self._engines):
            with suppress(TorchspecError, RuntimeError):  # gone or closed; captures find out, too
                usage, before = engine.usage(), self._last[number]
                self._last[number] = usage
                if before is not None and usage.seconds > before.seconds:  # else another one has started
                    self._rates[number] = rates(before, usage)


def rates(before: EngineUsage, after: EngineUsage) -> dict[str, float]:
    """As `Flow.engines` has them."""
    busy, tokens = after.busy_seconds - before.busy_seconds, after.tokens - before.tokens
    return {
        "tokens_per_second": tokens / busy if busy > 0 else 0.0,
        "busy": busy / (after.seconds - before.seconds),
        "records": after.records,
        "nbytes": after.nbytes,
    }
