from __future__ import annotations

import os
import signal
import threading

import pytest

from torchspec.core.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process(second: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), second)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


def test_outside_the_main_thread_nothing_is_touched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.received])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 0]
