"""Checkpoints measured beside the training: in turn, each once, and nothing is lost by whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.training import checkpoint_files as files
from torchspec.core.training import served
from torchspec.core.training.served import ServedChecks

# Stands for `torchspec eval --engine`: what it does is written in the checkpoint that it measures.
MEASURE = """
import json, os, sys, time
from pathlib import Path
checkpoint, result, journal = map(Path, sys.argv[1:])
plan = json.loads((checkpoint / "plan.json").read_text())
def note(what):
    with journal.open("a") as file:
        file.write(json.dumps([plan["step"], what, os.getpid()]) + "\\n")
note("begins")
if plan.get("child") and not os.fork():
    note("child")
    time.sleep(60)
print(plan.get("says", ""), flush=True)
time.sleep(plan.get("seconds", 0))
if "result" in plan:
    aside = result.with_name("aside")
    aside.write_text(plan["result"])
    aside.replace(result)
note("ends")
sys.exit(plan.get("exit", 0))
"""


def save(checkpoints: Path, step: int, length: float | None = None, **plan: Any) -> Path:
    """A checkpoint with one file in it; measured, it gives the acceptance length."""
    directory = files.directory_of(checkpoints, step)
    directory.mkdir(parents=True)
    if length is not None:
        plan["result"] = json.dumps({"acceptance_length": length})
    (directory / "plan.json").write_text(json.dumps({"step": step, **plan}))
    stored = files.stored_file(directory, directory / "plan.json")
    files.write_manifest(directory, files.Manifest(step=step, world_size=1, score=None, files=(stored,)))
    return directory


class Place:
    """A run's directory."""

    def __init__(self, root: Path) -> None:
        self.checkpoints, self.place, self.journal = root / "checkpoints", root / "served", root / "journal"
        self.opened: list[ServedChecks] = []

    def checks(self, timeout: float = 20) -> ServedChecks:
        def command(checkpoint: Path, result: Path) -> Sequence[str]:
            return [sys.executable, "-S", "-c", MEASURE, str(checkpoint), str(result), str(self.journal)]

        made = ServedChecks(self.place, self.checkpoints, command, engine="fake", timeout=timeout)
        self.opened.append(made)
        return made

    def done(self) -> list[tuple[int, str]]:
        """(step, begins or ends), in the order in which it happened."""
        return [(step, what) for step, what, _ in self._lines() if what != "child"]

    def pids(self, step: int) -> list[int]:
        """Of the processes that measure this step: the one that was started, and the one that it started."""
        return [pid for at, what, pid in self._lines() if at == step and what in ("begins", "child")]

    def _lines(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def score(self, step: int) -> float | None:
        return files.read_manifest(files.directory_of(self.checkpoints, step)).score

    def steps(self) -> list[int]:
        return files.steps_on_disk(self.checkpoints)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(served, "POLL_SECONDS", 0.01)
    place = Place(tmp_path)
    yield place
    for checks in place.opened:
        checks.close()


def never() -> bool:
    return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether the process is there and not merely its entry, which waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_at_a_time_in_the_order_of_steps(run: Place) -> None:
    checks = run.checks()
    for step, length in ((10, 1.5), (20, 2.5), (30, 2.0)):
        save(run.checkpoints, step, length, seconds=0.05)
        checks.start(step)
    rows = checks.wait(never)
    assert [(row["step"], row["acceptance_length"]) for row in rows] == [(10, 1.5), (20, 2.5), (30, 2.0)]
    assert run.done() == [(step, what) for step in (10, 20, 30) for what in ("begins", "ends")]
    assert [run.score(step) for step in (10, 20, 30)] == [1.5, 2.5, 2.0]
    assert json.loads((run.checkpoints / "best.json").read_text())["step"] == 20
    assert not checks.failures
    left = sorted(path.name for path in (run.place / "step_00000020").iterdir())
    assert left == ["eval.json", "eval.log"], "the copy of a checkpoint that was measured stays"


def test_collecting_does_not_wait(run: Place) -> None:
    save(run.checkpoints, 10, 1.5, seconds=0.5)
    checks = run.checks()
    checks.start(10)
    started = time.monotonic()
    assert checks.collect() == []
    assert time.monotonic() - started < 0.2
    until(lambda: (10, "ends") in run.done())
    time.sleep(0.1)
    assert [row["step"] for row in checks.collect()] == [10]
    assert checks.collect() == []


def test_rows_hold_figures_and_no_texts(run: Place) -> None:
    found = {
        "engine": "fake", "acceptance_length": 2.0, "acceptance_per_position": [0.7, 0.3], "lossless": True,
        "difference": None, "mismatches": [{"sample_id": "a"}], "machine": {"cpu": "x"}, "rounds": 7,
    }  # fmt: skip
    save(run.checkpoints, 10, result=json.dumps(found))
    checks = run.checks()
    checks.start(10)
    (row,) = checks.wait(never)
    shown = {name: value for name, value in found.items() if name not in ("mismatches", "machine")}
    assert row == {"kind": "served", "step": 10, **shown}
    assert json.loads((run.place / "step_00000010/eval.json").read_text()) == found


@pytest.mark.parametrize(("length", "back"), [(2.5, True), (2.0, False), (1.5, False)])
def test_a_checkpoint_that_was_dropped_meanwhile_comes_back_if_it_is_the_best(
    run: Place, length: float, back: bool
) -> None:
    """Whole, as it was: `keep_last` is about the newest ones, and the best one always stays."""
    first = save(run.checkpoints, 10, length)
    content = (first / "plan.json").read_bytes()
    other = save(run.checkpoints, 20, 2.0)
    files.write_manifest(other, replace(files.read_manifest(other), score=2.0))
    files.write_best(run.checkpoints)
    checks = run.checks()
    checks.start(10)
    files.remove(first)
    (row,) = checks.wait(never)
    assert row["acceptance_length"] == length
    assert run.steps() == ([10, 20] if back else [20])
    assert json.loads((run.checkpoints / "best.json").read_text())["step"] == (10 if back else 20)
    if back:
        assert run.score(10) == length
        assert (first / "plan.json").read_bytes() == content
        files.verify(first, files.read_manifest(first).files)
    assert not (run.place / "step_00000010/checkpoint").exists()


def test_the_first_to_be_measured_comes_back_as_nothing_is_better(run: Place) -> None:
    directory = save(run.checkpoints, 10, 1.0)
    save(run.checkpoints, 20, 1.0)
    checks = run.checks()
    checks.start(10)
    files.remove(directory)
    checks.wait(never)
    assert run.steps() == [10, 20]


def test_failures_are_told_at_the_end_and_hold_nothing_up(run: Place) -> None:
    """In the words of the process that failed; a figure that it left all the same counts."""
    error = "loading\ntorchspec: 1 configuration error:\n  - --engine: not available here"
    save(run.checkpoints, 10, says=error, exit=2)
    save(run.checkpoints, 20, says="Traceback ...\nMemoryError", exit=1)
    save(run.checkpoints, 30, 3.0, says="torchspec: fake accepts 3.000 where ours accepts 2.000", exit=1)
    save(run.checkpoints, 40, result="{cut o")
    save(run.checkpoints, 50, 1.5)
    checks = run.checks()
    for step in (10, 20, 30, 40, 50):
        checks.start(step)
    rows = checks.wait(never)
    assert [(row["step"], row["acceptance_length"]) for row in rows] == [(30, 3.0), (50, 1.5)]
    assert [text.split(":")[0] for text in checks.failures] == [f"fake at step {step}" for step in (10, 20, 30, 40)]
    assert checks.failures[0] == "fake at step 10: 1 configuration error:\n  - --engine: not available here"
    assert checks.failures[1].endswith("Traceback ...\nMemoryError")
    assert checks.failures[2] == "fake at step 30: fake accepts 3.000 where ours accepts 2.000"
    assert [run.score(step) for step in (10, 20, 30, 40, 50)] == [None, None, 3.0, None, 1.5]
    assert run.checks().wait(never) == [], "a failed one is not tried for ever"


def test_what_takes_too_long_is_ended_with_all_it_started(run: Place) -> None:
    save(run.checkpoints, 10, 9.0, seconds=60, child=True)
    save(run.checkpoints, 20, 1.5)
    checks = run.checks(timeout=1.5)
    checks.start(10)
    until(lambda: len(run.pids(10)) == 2)
    assert all(map(runs, run.pids(10)))
    checks.start(20)
    rows = checks.wait(never)
    until(lambda: not any(map(runs, run.pids(10))))
    assert [row["step"] for row in rows] == [20]
    assert checks.failures == ["fake at step 10: took longer than 2 s (eval.timeout)"]
    assert run.score(10) is None


def test_a_run_that_stops_leaves_what_is_unfinished_to_the_next(run: Place) -> None:
    save(run.checkpoints, 10, 1.5)
    save(run.checkpoints, 20, 2.0, seconds=60, child=True)
    save(run.checkpoints, 30, 2.5)
    checks = run.checks()
    for step in (10, 20, 30):
        checks.start(step)
    rows = checks.wait(lambda: len(run.pids(20)) == 2)
    assert [row["step"] for row in rows] == [10]
    assert all(map(runs, run.pids(20))), "waiting was over, and nothing else"
    checks.close()
    checks.close()
    until(lambda: not any(map(runs, run.pids(20))))
    assert not checks.failures, "being stopped is no failure"

    plan = run.place / "step_00000020/checkpoint/plan.json"
    plan.unlink()  # it is a link to the checkpoint's own
    plan.write_text(json.dumps({"step": 20, "result": json.dumps({"acceptance_length": 2.0})}))
    run.journal.unlink()
    again = run.checks()
    again.start(10)
    rows = again.wait(never)
    assert [(row["step"], row["acceptance_length"]) for row in rows] == [(20, 2.0), (30, 2.5)]
    assert (10, "begins") not in run.done(), "measured already"
    assert [run.score(step) for step in (10, 20, 30)] == [1.5, 2.0, 2.5]


def test_a_copy_that_was_not_finished_is_made_anew(run: Place) -> None:
    save(run.checkpoints, 10, 1.5)
    half = run.place / "step_00000010" / ".checkpoint"
    half.mkdir(parents=True)
    checks = run.checks()
    assert checks.wait(never) == []
    checks.start(10)
    assert [row["step"] for row in checks.wait(never)] == [10]
    assert not half.exists()


def test_a_file_system_without_links_costs_a_copy(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    directory = save(run.checkpoints, 10, 1.5)
    monkeypatch.setattr(os, "link", refuse)
    checks = run.checks()
    checks.start(10)
    shutil.rmtree(directory)
    assert [row["step"] for row in checks.wait(never)] == [10]
    assert run.steps() == [10]


def test_the_step_that_is_being_measured_is_not_begun_again(run: Place) -> None:
    """The end of a run asks once more for its last step."""
    save(run.checkpoints, 10, 1.5, seconds=0.3, exit=1, says="torchspec: it serves otherwise")
    checks = run.checks()
    checks.start(10)
    checks.start(10)
    rows = checks.wait(lambda: False)
    assert run.done() == [(10, "begins"), (10, "ends")]
    assert [row["acceptance_length"] for row in rows] == [1.5]
    assert checks.failures == ["fake at step 10: it serves otherwise"], "its log went with its folder"


def test_a_mismatch_is_told_by_every_later_session_too(run: Place) -> None:
    save(run.checkpoints, 10, 1.5, exit=1, says="torchspec: it serves otherwise")
    first = run.checks()
    first.start(10)
    (row,) = first.wait(lambda: False)
    assert "failure" not in row
    first.close()
    assert run.checks().failures == ["fake at step 10: it serves otherwise"]


def test_what_was_measured_beyond_the_step_that_a_run_goes_on_from_is_forgotten(run: Place) -> None:
    for step in (10, 20):
        save(run.checkpoints, step, 1.5)
    checks = run.checks()
    for step in (10, 20):
        checks.start(step)
    checks.wait(lambda: False)
    again = run.checks()
    again.forget_after(10)
    again.start(10)
    again.start(20)
    again.wait(lambda: False)
    assert [step for step, what in run.done() if what == "begins"] == [10, 20, 20]
