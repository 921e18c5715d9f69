"""Trackers beside a training: nothing waits for them, nothing that they do stops it, and it is said once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from torchspec.core.interfaces.device import Availability
from torchspec.core.interfaces.tracker import Result, TrackedRun, Tracker, TrackerSpec
from torchspec.core.training import tracking
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.tracking import Tracking, scalars

RUN = TrackedRun(
    id="1", name="mine", project=None, step=0, directory=Path("."), config={}, environment={}
)  # fmt: skip


class Kept:
    """What came, and from which thread."""

    def __init__(self, run: TrackedRun | None = None) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.found: dict[str, Result] = {}
        self.closed = 0
        self.threads: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.threads.add(threading.current_thread().name)
        self.rows.append((step, values))

    def results(self, values: Mapping[str, Result]) -> None:
        self.found.update(values)

    def close(self) -> None:
        self.closed += 1


def spec(tracker: Tracker, name: str = "kept") -> TrackerSpec:
    return TrackerSpec(name=name, probe=lambda: Availability(ok=True), open=lambda run: tracker)


def row(step: int, **values: object) -> dict[str, object]:
    return {"kind": "train", "step": step, **values}


def test_numbers_of_a_row_get_names() -> None:
    plain = row(3, loss=2.5, accuracy=[0.5, 0.25], time={"data": 0.1}, engines=[{"busy": 1}])
    found = scalars({**plain, "lr": None, "on": True, "bad": float("nan")})
    assert found == {
        "train/loss": 2.5,
        "train/accuracy/1": 0.5,
        "train/accuracy/2": 0.25,
        "train/time.data": 0.1,
        "train/engines/1.busy": 1.0,
    }


def test_every_row_and_the_results_arrive_in_order(tmp_path: Path) -> None:
    kept = Kept()
    following = Tracking([spec(kept)], RUN)
    with MetricsLog(tmp_path / "metrics.jsonl", tracker=following) as log:
        for step in range(1, 200):
            log.write(row(step, loss=1.0 / step))
    following.results({"acceptance_length": 2.5})
    following.close()
    assert [step for step, _ in kept.rows] == list(range(1, 200))
    assert kept.rows[1][1] == {"train/loss": 0.5}
    assert (kept.found, kept.closed) == ({"acceptance_length": 2.5}, 1)
    assert kept.threads == {"tracker-kept"}


def test_what_fails_is_said_once_and_stops_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-sesame")

    class Failing(Kept):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            if step % 2:
                raise ConnectionError("no route to https://me:word@host, key sesame-sesame")
            super().log(step, values)

    failing, kept = Failing(), Kept()
    following = Tracking([spec(failing, "failing"), spec(kept)], RUN)
    for step in range(1, 9):
        following.write(row(step, loss=1.0))
    following.close()
    assert [step for step, _ in failing.rows] == [2, 4, 6, 8]
    assert failing.closed == 1
    assert [step for step, _ in kept.rows] == list(range(1, 9))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "tracker failing: ConnectionError: no route to https://***@host, key ***; nothing else is affected",
        "tracker failing missed 4 rows; metrics.jsonl has them all",
    ]


def test_one_that_cannot_be_opened_is_tried_again_and_gets_what_it_missed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "BETWEEN_ATTEMPTS", 0.01)
    kept, attempts, there = Kept(), [], threading.Event()

    def opening(run: TrackedRun) -> Tracker:
        attempts.append(run)
        if len(attempts) < 3:
            raise OSError("down")
        there.set()
        return kept

    following = Tracking([TrackerSpec(name="late", probe=lambda: Availability(ok=True), open=opening)], RUN)
    following.write(row(1, loss=1.0))
    assert there.wait(60)
    following.close()
    assert [step for step, _ in kept.rows] == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "tracker late: OSError: down; nothing else is affected"
    ]


def test_one_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ROWS_WAITING", 3)
    released, entered = threading.Event(), threading.Event()

    class Hanging(Kept):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            entered.set()
            released.wait()

    following = Tracking([spec(Hanging(), "hanging")], RUN, patience=0.05)
    following.write(row(1, loss=1.0))
    entered.wait()

    def write() -> None:
        for step in range(2, 10):  # three of them find room
            following.write(row(step, loss=1.0))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(15)
    assert not writer.is_alive(), "the training waits for a tracker"
    following.close()
    released.set()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        "tracker hanging: it is too slow or does not answer; nothing else is affected",
        "tracker hanging missed 8 rows; metrics.jsonl has them all",
    ]
