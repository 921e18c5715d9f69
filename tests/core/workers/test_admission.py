"""What waits in the store stays within its bound, and whoever waits gets in or hears why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from torchspec.core.errors import StoreFullError
from torchspec.core.features.conformance import sample_features
from torchspec.core.features.memory import MemoryStore
from torchspec.core.workers.admission import Admission

RECORD = sample_features(1, taps=(1,), hidden=10)  # 8 bytes of ids, 80 of hidden states
BYTES = 88


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def until(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def entering(admission: Admission, nbytes: int, log: list[str], name: str, leave: threading.Event) -> threading.Thread:
    """A thread that enters, notes that it did, and stays until told."""

    def work() -> None:
        with admission.room_for(nbytes, soon(20)):
            log.append(name)
            assert leave.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_what_can_never_fit_is_said_at_once() -> None:
    started = time.monotonic()
    message = r"take 1\.5 MB and the store may hold 1\.0 MB: raise engine\.store_mb"
    with pytest.raises(StoreFullError, match=message), Admission(MemoryStore(), 10**6).room_for(1_500_000, soon(60)):
        pytest.fail("it was let in")
    assert time.monotonic() - started < 1


def test_records_that_nobody_took_keep_others_out_until_they_are_taken() -> None:
    store = MemoryStore()
    admission = Admission(store, 2 * BYTES)
    refs = [store.put(name, RECORD) for name in "ab"]
    assert store.usage().nbytes == 2 * BYTES
    with pytest.raises(StoreFullError, match="wait in the store to be taken"), admission.room_for(BYTES, soon(0.1)):
        pytest.fail("it was let in")
    entered: list[str] = []
    leave = threading.Event()
    thread = entering(admission, BYTES, entered, "late", leave)
    time.sleep(0.1)
    assert not entered
    store.remove(refs[0])
    until(lambda: entered == ["late"])
    leave.set()
    thread.join()


def test_work_that_has_not_stored_anything_yet_counts() -> None:
    admission = Admission(MemoryStore(), 100)
    with admission.room_for(60, soon()):
        with pytest.raises(StoreFullError, match="no room"), admission.room_for(60, soon(0.1)):
            pytest.fail("it was let in")
        with admission.room_for(40, soon()):
            pass
    with admission.room_for(100, soon(0.1)):
        pass


def test_work_that_fails_gives_its_room_back() -> None:
    admission = Admission(MemoryStore(), 100)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.room_for(100, soon(0.1)):
            raise ZeroDivisionError
    with pytest.raises(StoreFullError), admission.room_for(101, soon(0.1)):
        pass
    with admission.room_for(100, soon(0.1)):
        pass


def test_a_small_one_does_not_overtake_a_big_one_that_came_first() -> None:
    """Else a stream of small ones would keep a big one out for ever."""
    admission = Admission(MemoryStore(), 100)
    entered: list[str] = []
    first, second, third = (threading.Event() for _ in range(3))
    threads = [entering(admission, 60, entered, "first", first)]
    until(lambda: entered == ["first"])
    threads.append(entering(admission, 100, entered, "big", second))
    until(admission._turn.locked)
    threads.append(entering(admission, 10, entered, "small", third))
    time.sleep(0.1)
    assert entered == ["first"]
    first.set()
    until(lambda: entered == ["first", "big"])
    second.set()
    until(lambda: entered == ["first", "big", "small"])
    third.set()
    for thread in threads:
        thread.join()


def test_whoever_queues_behind_another_has_a_deadline_too() -> None:
    admission = Admission(MemoryStore(), 100)
    entered: list[str] = []
    first, second = threading.Event(), threading.Event()
    threads = [entering(admission, 60, entered, "first", first)]
    until(lambda: entered == ["first"])
    threads.append(entering(admission, 100, entered, "big", second))
    until(admission._turn.locked)
    started = time.monotonic()
    with pytest.raises(StoreFullError, match="no room"), admission.room_for(10, soon(0.2)):
        pytest.fail("it was let in")
    assert time.monotonic() - started < 2
    first.set()
    second.set()
    for thread in threads:
        thread.join()
    assert entered == ["first", "big"]


def test_the_bound_holds_with_many_at_a_time() -> None:
    """Each stores its record, which is taken later; what the store held is never more than it may."""
    store = MemoryStore()
    admission = Admission(store, 3 * BYTES)
    most, failures = [0], []

    def work(number: int) -> None:
        try:
            with admission.room_for(BYTES, soon(20)):
                ref = store.put(str(number), RECORD)
                most[0] = max(most[0], store.usage().nbytes)
            time.sleep(0.002)
            store.remove(ref)
        except Exception as error:  # noqa: BLE001 - it belongs to the test, not to its thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 0 < most[0] <= 3 * BYTES
    assert store.usage().records == 0
