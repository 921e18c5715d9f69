"""Any `TargetEngine` that runs in the process that loads it, as the engine of a worker: hf, and those of plug-ins.

What comes in one request is captured together, as in the trainer's own process, so that it comes out the same to the
last bit; requests are worked on one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torchspec.core.errors import TargetError
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, ServedText, ServingCounters, TargetEngine
from torchspec.core.interfaces.features import Quarantined
from torchspec.core.workers.runner import Ask, Facts, Landing


class HostedRunner:
    """See `Runner`. The engine is used from one thread."""

    landing: Landing | None

    def __init__(self, engine: TargetEngine, taps: Sequence[int], facts: Facts) -> None:
        self.facts = facts
        self._store = MemoryStore()
        self.landing = self._store
        self._engine, self._taps = engine, tuple(taps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def capture(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
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

    def write(self, ask: Ask) -> Future[ServedText]:
        return self._thread.submit(self._write, ask)

    def _write(self, ask: Ask) -> ServedText:
        (tokens,) = self._engine.generate(
            [ask.input_ids], max_new_tokens=ask.max_new_tokens, temperature=ask.temperature, seed=ask.seed
        )
        return ServedText(tokens=tuple(tokens))

    def counters(self) -> ServingCounters:
        raise TargetError(f"{self.facts.engine} serves no drafts, so it counts nothing")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
