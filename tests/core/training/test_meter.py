"""What is told of engines that work beside a training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import EngineUsage
from torchspec.core.training import meter
from torchspec.core.training.meter import Meter, rates


def usage(seconds: float, busy: float, tokens: int) -> EngineUsage:
    return EngineUsage(seconds=seconds, busy_seconds=busy, tokens=tokens, records=2, nbytes=300)


class Engine:
    """Answers one after the other; an error is raised."""

    def __init__(self, *answers: EngineUsage | Exception) -> None:
        self.answers = list(answers)
        self.hold = threading.Event()
        self.hold.set()

    def usage(self) -> EngineUsage:
        self.hold.wait(5)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_rates_are_of_the_time_between_two_answers() -> None:
    found = rates(usage(10.0, 4.0, 1000), usage(14.0, 6.0, 3000))
    assert found == {"tokens_per_second": 1000.0, "busy": 0.5, "records": 2, "nbytes": 300}
    assert rates(usage(10.0, 4.0, 1000), usage(14.0, 4.0, 1000))["tokens_per_second"] == 0.0


def test_nothing_waits_for_an_engine_and_one_that_fails_or_starts_anew_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meter, "EVERY_SECONDS", 0.0)
    steady = Engine(usage(1, 1, 10), usage(2, 1.5, 20), usage(3, 2.5, 40), usage(4, 2.5, 40))
    other = Engine(usage(50, 1, 5), TargetError("gone"), usage(1, 0, 0), usage(2, 1, 7))
    told = Meter([steady, other])  # type: ignore[list-item]
    steady.hold.clear()
    begin = time.monotonic()
    told.look()
    told.look()
    assert time.monotonic() - begin < 1.0
    assert told.rates() == ()
    steady.hold.set()
    until(lambda: len(other.answers) == 3)
    for left in (2, 1, 0):

        def asked(left: int = left) -> bool:
            told.look()
            return len(other.answers) <= left

        until(asked)
    until(lambda: len(told.rates()) == 2)
    first, second = told.rates()
    assert first["busy"] in (0.0, 1.0)
    assert second == {"tokens_per_second": 7.0, "busy": 1.0, "records": 2, "nbytes": 300}
    told.close()
