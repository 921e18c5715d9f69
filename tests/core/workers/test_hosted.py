"""An engine of this process behind a worker's runner: one call for what was asked together, one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core.errors import TargetError
from torchspec.core.features.conformance import sample_features
from torchspec.core.interfaces.engine import CaptureRequest, DraftSource
from torchspec.core.interfaces.features import Captured, Features, FeatureSink, Quarantined
from torchspec.core.workers.hosted import HostedRunner
from torchspec.core.workers.runner import Ask, Facts

TAPS = (1, 3)
REFUSED, BROKEN, SILENT = 91, 92, 93
FACTS = Facts(
    engine="plain", engine_version="1", layers=6, hidden_size=4, itemsize=4, context=64, vocab_size=100,
    norm_state="post_norm",
)  # fmt: skip


class Plain:
    """An engine whose calls wait until the test lets them go."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], tuple[int, ...]]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.inside = self.most = 0
        self.closed = False

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        self.calls.append(([request.record_id for request in batch], tuple(taps)))
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.begun.release()
        self.go.acquire()
        self.inside -= 1
        return [self._one(request, sink) for request in batch]

    def _one(self, request: CaptureRequest, sink: FeatureSink) -> Captured:
        if BROKEN in request.input_ids:
            raise ZeroDivisionError("oh")
        if SILENT in request.input_ids:
            raise RuntimeError
        if REFUSED in request.input_ids:
            return Quarantined(record_id=request.record_id, reason="hidden states that are not finite")
        made = sample_features(len(request.input_ids), taps=TAPS)
        return sink.put(request.record_id, Features(**{**vars(made), "input_ids_T": torch.tensor(request.input_ids)}))

    def generate(self, prompts: Sequence[Sequence[int]], **named: Any) -> list[list[int]]:
        assert named == {"max_new_tokens": 3, "temperature": 0.5, "seed": 8}
        return [[prompt[-1] + 1] for prompt in prompts]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> Plain:
    return Plain()


@pytest.fixture
def runner(engine: Plain) -> Iterator[HostedRunner]:
    made = HostedRunner(engine, TAPS, FACTS)  # type: ignore[arg-type]
    yield made
    engine.go.release(100)
    made.close()


def samples(*ids: list[int], name: str = "s") -> list[CaptureRequest]:
    return [CaptureRequest(record_id=f"{name}{number}", input_ids=each) for number, each in enumerate(ids)]


def test_what_is_asked_together_is_captured_together_and_requests_one_by_one(
    runner: HostedRunner, engine: Plain
) -> None:
    first = runner.capture(samples([1, 2], [3], [4, 5, 6]))
    second = runner.capture(samples([7], name="t"))
    assert engine.begun.acquire(timeout=5)
    assert not any(future.done() for future in (*first, *second))
    engine.go.release(2)
    for future in (*first, *second):
        assert future.result(5) is None
    assert engine.calls == [(["s0", "s1", "s2"], TAPS), (["t0"], TAPS)]
    assert engine.most == 1
    assert runner.landing is not None
    for name, ids in (("s0", [1, 2]), ("s2", [4, 5, 6]), ("t0", [7])):
        assert runner.landing.get(runner.landing.find(name)).input_ids_T.tolist() == ids


def test_a_sample_that_is_refused_takes_no_other_with_it(runner: HostedRunner, engine: Plain) -> None:
    engine.go.release()
    good, refused, last = runner.capture(samples([1], [REFUSED], [2]))
    with pytest.raises(TargetError, match="hidden states that are not finite"):
        refused.result(5)
    assert (good.result(5), last.result(5)) == (None, None)


@pytest.mark.parametrize(("token", "said"), [(BROKEN, "oh"), (SILENT, "RuntimeError")])
def test_an_error_of_the_engine_reaches_all_who_wait_and_it_goes_on(
    runner: HostedRunner, engine: Plain, token: int, said: str
) -> None:
    engine.go.release(2)
    failed = runner.capture(samples([1], [token]))
    for future in failed:
        with pytest.raises(TargetError, match=said):
            future.result(5)
    (fine,) = runner.capture(samples([2], name="t"))
    assert fine.result(5) is None


def test_what_nobody_waits_for_any_more_is_not_captured(runner: HostedRunner, engine: Plain) -> None:
    runner.capture(samples([1], name="first"))
    assert engine.begun.acquire(timeout=5)
    given_up, wanted = runner.capture(samples([2], [3]))
    (alone,) = runner.capture(samples([4], name="alone"))
    assert given_up.cancel()
    assert alone.cancel()
    engine.go.release(9)
    assert wanted.result(5) is None
    (text,) = runner.write([Ask(input_ids=[5], max_new_tokens=3, temperature=0.5, seed=1, common_seed=8, stop=[])])
    assert text.result(5).tokens == (6,)
    assert [names for names, _ in engine.calls] == [["first0"], ["s1"]]


def test_text_without_counters(runner: HostedRunner) -> None:
    """Together, with the seed from which each one's own was made."""
    asks = [
        Ask(input_ids=[1, number], max_new_tokens=3, temperature=0.5, seed=number, common_seed=8, stop=[])
        for number in (4, 7)
    ]
    assert [text.result(5).tokens for text in runner.write(asks)] == [(5,), (8,)]
    with pytest.raises(TargetError, match="plain serves no drafts"):
        runner.counters()


def test_text_is_written_with_the_draft_of_a_training(engine: Plain) -> None:
    """By an engine that can be stepped, which asks for the draft where it is left; others say so."""
    followed = []

    class Nothing:
        def drafter(self) -> None:
            """There is none yet, so the target writes alone."""

    def follow(source: DraftSource) -> Nothing:
        followed.append(source)
        return Nothing()

    source = DraftSource(directory=Path("pushed"), length=2)
    asks = [Ask(input_ids=[4], max_new_tokens=3, temperature=0.5, seed=1, common_seed=8, stop=[], source=source)]
    stepped = HostedRunner(engine, TAPS, FACTS, follow)  # type: ignore[arg-type]
    for _ in range(2):
        assert [text.result(5).tokens for text in stepped.write(asks)] == [(5,)]
    stepped.close()
    assert followed == [source]
    other = HostedRunner(engine, TAPS, FACTS)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="plain writes without drafts"):
        other.write(asks)
    other.close()


def test_closing_does_not_wait_for_a_capture(engine: Plain) -> None:
    runner = HostedRunner(engine, TAPS, FACTS)  # type: ignore[arg-type]
    runner.capture(samples([1]))
    runner.capture(samples([2], name="queued"))
    assert engine.begun.acquire(timeout=5)
    runner.close()
    assert engine.closed
    engine.go.release(2)
    assert not engine.begun.acquire(timeout=0.1), "what was queued is begun"
