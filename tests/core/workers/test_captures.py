"""Captures that callers share: made once, a part for each, and nothing stays, whoever comes late or never."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from torchspec.core.errors import TargetError
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.workers.captures import Captures

IDS = [1, 2, 3, 4]
PARTS = (((0, 2),), ((2, 4),))


class Beginning:
    """Takes samples, and finishes them when the test says so."""

    def __init__(self) -> None:
        self.landing = MemoryStore()
        self.asked: list[list[str]] = []
        self.futures: dict[str, list[Future[None]]] = {}

    def __call__(self, samples: Sequence[CaptureRequest]) -> list[Future[None]]:
        self.asked.append([sample.record_id for sample in samples])
        futures: list[Future[None]] = [Future() for _ in samples]
        for sample, future in zip(samples, futures, strict=True):
            self.futures.setdefault(sample.record_id, []).append(future)
        return futures

    def finish(self, record_id: str) -> None:
        """The newest capture under this name."""
        self.landing.put(record_id, sample_features(len(IDS)))
        self.futures[record_id][-1].set_result(None)


@pytest.fixture
def begun() -> Beginning:
    return Beginning()


@pytest.fixture
def captures(begun: Beginning) -> Captures:
    return Captures(begun, begun.landing)


def part(number: int, record_id: str = "a-0") -> CaptureRequest:
    return CaptureRequest(record_id=record_id, input_ids=IDS, parts=PARTS, part=number)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("finished", ["before the second comes", "after"])
def test_two_callers_share_one_capture(
    begun: Beginning, captures: Captures, order: tuple[int, int], finished: str
) -> None:
    (first,) = captures.enter([part(order[0])], soon())
    if finished == "before the second comes":
        begun.finish("a-0")
        captures.leave(first)
        assert len(begun.landing) == 1, "the other has not taken its part"
        (second,) = captures.enter([part(order[1])], soon())
    else:
        (second,) = captures.enter([part(order[1])], soon())
        begun.finish("a-0")
        captures.leave(first)
    assert begun.asked == [["a-0"]]
    assert captures.ref(second).length == len(IDS)
    captures.leave(second)
    assert len(begun.landing) == 0
    captures.enter([part(0)], soon())
    assert begun.asked == [["a-0"], ["a-0"]], "what is gone is made again"


def test_what_is_new_of_a_request_is_captured_together(begun: Beginning, captures: Captures) -> None:
    """And the captures come in the order of the requests."""
    captures.enter([part(0, "b")], soon())
    found = captures.enter([part(1, name) for name in "abcd"], soon())
    assert begun.asked == [["b"], ["a", "c", "d"]]
    assert [capture.request.record_id for capture in found] == ["a", "b", "c", "d"]


def test_a_request_without_parts_has_one_caller(begun: Beginning, captures: Captures) -> None:
    """Who may keep the record."""
    for name, keep in (("dropped", False), ("kept", True)):
        (capture,) = captures.enter([CaptureRequest(record_id=name, input_ids=IDS)], soon())
        begun.finish(name)
        captures.leave(capture, keep=keep)
    assert [begun.landing.usage().records, begun.landing.find("kept").length] == [1, len(IDS)]


@pytest.mark.parametrize("finished", ["in time", "when nobody waits any more", "never begun"])
def test_the_part_of_one_that_never_comes_is_dropped(begun: Beginning, captures: Captures, finished: str) -> None:
    (capture,) = captures.enter([part(0)], soon(0.03))
    if finished == "in time":
        begun.finish("a-0")
    elif finished == "when nobody waits any more":
        assert begun.futures["a-0"][0].set_running_or_notify_cancel()
    captures.leave(capture)
    captures.enter([part(0, "other")], soon())
    assert len(begun.landing) == (finished == "in time"), "its time is not over"
    time.sleep(0.04)
    captures.enter([part(1, "other")], soon())
    if finished == "when nobody waits any more":
        begun.finish("a-0")
    assert begun.futures["a-0"][0].cancelled() == (finished == "never begun")
    assert len(begun.landing) == 0
    captures.enter([part(1)], soon())
    assert begun.asked[-1] == ["a-0"], "one that comes after all has it made again"


def test_who_comes_later_has_more_time(begun: Beginning, captures: Captures) -> None:
    (first,) = captures.enter([part(0)], soon(0.03))
    (second,) = captures.enter([part(1)], soon())
    begun.finish("a-0")
    captures.leave(first)
    time.sleep(0.04)
    captures.enter([part(0, "other")], soon())
    assert captures.ref(second).length == len(IDS)
    captures.leave(second)
    assert len(begun.landing) == 0


def test_a_failure_reaches_both(begun: Beginning, captures: Captures) -> None:
    (first,), (second,) = (captures.enter([part(number)], soon()) for number in (0, 1))
    begun.futures["a-0"][0].set_exception(TargetError("not finite"))
    for capture in (first, second):
        with pytest.raises(TargetError, match="not finite"):
            capture.future.result(0)
        captures.leave(capture)
    captures.enter([part(0)], soon())
    assert begun.asked == [["a-0"], ["a-0"]], "the failure stays for those who try again"


def test_attempts_do_not_meet(begun: Beginning, captures: Captures) -> None:
    """One that failed asks again under another name: it gets no record that the others of its turn still wait for."""
    (first,) = captures.enter([part(0, "a-0")], soon())
    (again,) = captures.enter([part(0, "a-1")], soon())
    assert begun.asked == [["a-0"], ["a-1"]]
    begun.finish("a-1")
    assert not first.future.done()
    assert captures.ref(again).record_id == "a-1"
