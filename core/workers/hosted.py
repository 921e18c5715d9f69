"""Any `TargetEngine` that runs in the process that loads it, as the engine of a worker: hf, and those of plug-ins.

What comes in one request is captured together, as in the trainer's own process, so that it comes out the same to the
last bit; requests are worked on one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torchspec.core.decoding.pushed import PushedDraft
from torchspec.core.decoding.writing import Follow, TextWriter
from torchspec.core.errors import TargetError
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.engine import (
    CaptureRequest,
    DraftSource,
    ServedText,
    ServingCounters,
    TargetEngine,
)
from torchspec.core.interfaces.features import Quarantined
from torchspec.core.workers.runner import Ask, Facts, Landing, refuse_images


class HostedRunner:
    """See `Runner`. The engine is used from one thread."""

    landing: Landing | None

    def __init__(self, engine: TargetEngine, taps: Sequence[int], facts: Facts, follow: Follow | None = None) -> None:
        """`follow` opens drafts to write with; None: the engine cannot."""
        self.facts = facts
        self._drafts = follow is not None
        self._writer = TextWriter(engine, follow or _no_drafts)
        self._store = MemoryStore()
        self.landing = self._store
        self._engine, self._taps = engine, tuple(taps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        refuse_images(self.facts, samples)
        futures: list[Future[None]] = [Future() for _ in samples]
        self._thread.submit(self._capture, list(samples), futures)
        return futures

    def _capture(self, samples: Sequence[CaptureRequest], futures: Sequence[Future[None]]) -> None:
        wanted = [(s, f) for s, f in zip(samples, futures, strict=True) if f.set_running_or_notify_cancel()]
        try:
            found = self._engine.capture([sample for sample, _ in wanted], self._taps, self._store) if wanted else []
        except Exception as error:  # it must reach whoever waits, whatever it is  # noqa: BLE001
            for _, future in wanted:
                future.set_exception(TargetError(str(error) or type(error).__name__))
            return
        for (_, future), each in zip(wanted, found, strict=True):
            if isinstance(each, Quarantined):
                future.set_exception(TargetError(each.reason))
            else:
                future.set_result(None)

    def write(self, asks: Sequence[Ask]) -> list[Future[ServedText]]:
        refuse_images(self.facts, asks)
        if not self._drafts and any(ask.source is not None for ask in asks):
            raise TargetError(f"{self.facts.engine} writes without drafts: it cannot be stepped token by token")
        futures: list[Future[ServedText]] = [Future() for _ in asks]
        self._thread.submit(self._write, list(asks), futures)
        return futures

    def _write(self, asks: Sequence[Ask], futures: Sequence[Future[ServedText]]) -> None:
        wanted = [(a, f) for a, f in zip(asks, futures, strict=True) if f.set_running_or_notify_cancel()]
        if not wanted:
            return
        first = wanted[0][0]
        try:
            texts = self._writer.write(
                [ask.input_ids for ask, _ in wanted],
                max_new_tokens=first.max_new_tokens,
                temperature=first.temperature,
                seed=first.common_seed,
                source=first.source,
                images=[ask.images for ask, _ in wanted],
            )
        except Exception as error:  # it must reach whoever waits, whatever it is  # noqa: BLE001
            for _, future in wanted:
                future.set_exception(TargetError(str(error) or type(error).__name__))
            return
        for (_, future), text in zip(wanted, texts, strict=True):
            future.set_result(text)

    def counters(self) -> ServingCounters:
        raise TargetError(f"{self.facts.engine} serves no drafts, so it counts nothing")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()


def _no_drafts(source: DraftSource) -> PushedDraft:
    raise AssertionError(source)
