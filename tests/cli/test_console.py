"""Progress in logs: early, seldom, and complete; plain text whatever happens."""

from __future__ import annotations

import json
import logging
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from torchspec.cli import console
from torchspec.cli.console import ProgressDisplay, counted, span
from torchspec.cli.figures import RunFigures

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
ROW = {"kind": "train", "step": 3, "loss": 2.5, "simulated_acceptance_length": 1.75, "tokens_per_second": 1234.5}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said, each line behind the time of day and without a control character."""
    said = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in said)
    assert all(STAMP.match(line) for line in said.splitlines())
    return [STAMP.sub("", line) for line in said.splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the display sees, and no thread that looks at it."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "TICK", 3600.0)
    return now


def test_a_log_gets_the_first_and_the_last_of_each_stage(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with ProgressDisplay() as progress:
        for done in range(1001):
            progress("generate", done, 1000)
        progress("capture", 7, 0)
        progress("capture", 8, 0)
    assert lines(capsys) == ["generate 0/1000", "generate 1000/1000", "capture 7"]


def test_a_slow_stage_reports_now_and_then_and_more_seldom(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with ProgressDisplay() as progress:
        for done in range(101):
            clock[0] = 2.0 * done
            progress("train", done, 100)
            if done % 10 == 5:  # what goes on within it has its own first and last line
                progress("validate", 0, 2)
                progress("validate", 2, 2)
    said = lines(capsys)
    trained = [line for line in said if line.startswith("train")]
    steps = [int(re.match(r"train (\d+)", line)[1]) for line in trained]  # type: ignore[index]
    assert steps[:5] == [0, 3, 6, 9, 12]
    assert steps[-1] == 100
    assert max(b - a for a, b in pairwise(steps)) == 5  # 10 s, a twentieth of 200
    assert trained[3] == "train 9/100, 3:02 left"  # 91 steps of 2 s
    assert [line for line in said if not line.startswith("train")] == ["validate 0/2", "validate 2/2"] * 10


def test_a_day_of_it_fits_on_a_few_pages(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with ProgressDisplay() as progress:
        for done in range(24 * 60 * 6):
            clock[0] = 10.0 * done
            progress("train", done, 24 * 60 * 6)
    assert len(lines(capsys)) < 400


def test_a_phase_that_says_nothing_is_still_seen_to_live(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "TICK", 0.001)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.002)
    said: list[str] = []
    with ProgressDisplay() as progress, progress.phase("load target"):
        while len(said) < 3:
            said += lines(capsys)
            time.sleep(0.001)
    said += lines(capsys)
    assert said[0] == "load target 0/1"
    assert set(said[1:-1]) == {"load target 0/1"}
    assert said[-1] == "load target 1/1"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(silent=True) as progress:
        progress("train", 1, 2)
        logging.getLogger("torchspec.core.x").warning("twice is too often")
    assert lines(capsys) == []


def test_log_records_are_shown_and_the_handler_goes(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger("torchspec").handlers)
    with ProgressDisplay():
        logging.getLogger("torchspec.core.x").info("resuming from step %d", 7)
    assert lines(capsys) == ["INFO: resuming from step 7"]
    assert logging.getLogger("torchspec").handlers == before


def test_bytes_have_a_unit(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with ProgressDisplay() as progress:
        progress("hash data", 0, 1234)
        progress("tokenise", 5_000_000_000, 5_000_000_000)
    assert lines(capsys) == ["hash data 0.0/1.2 kB", "tokenise 5000.0/5000.0 MB"]


def test_spans() -> None:
    assert [span(s) for s in (0.4, 59.6, 3600, 90061)] == ["0:00", "1:00", "1:00:00", "1d 1:01:01"]


def test_one_of_a_thing() -> None:
    assert [counted(count, "prompt") for count in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]


def test_a_training_shows_its_newest_figures(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    figures = RunFigures(metrics)
    assert (figures.line(), figures.step, figures.sections()) == ("", 0, [])
    text = "".join(json.dumps(each) + "\n" for each in ({**ROW, "loss": 9.0}, ROW, {"kind": "validation", "step": 3}))
    metrics.write_text(text + '{"kind": "tra')
    assert figures.line() == "loss 2.500, simulated acceptance 1.75, 1234 tokens/s"
    assert figures.step == 3
    with metrics.open("a") as stream:  # the line is written to its end, and another one
        stream.write('in", "step": 4, "loss": 1.5, "tokens_per_second": 10}\n')
    assert (figures.line(), figures.step) == ("loss 1.500, 10 tokens/s", 4)
    metrics.write_text(json.dumps(ROW) + "\n")  # a resumed run has cut it
    assert figures.step == 3


def test_a_screen_has_everything_worth_watching(tmp_path: Path) -> None:
    engines = [{"tokens_per_second": 400.0, "busy": busy, "records": 1, "nbytes": 10**6} for busy in (0.5, 1.0)]
    flow = {"held_bytes": 5 * 10**6, "turns_ahead": 2, "engines": engines}
    row = {
        **ROW, "epoch": 0, "lr": 1e-3, "grad_norm": 0.5, "step_seconds": 2.0, "accuracy_per_position": [0.75, 0.5],
        "memory": {"allocated": 1, "peak": 2 * 10**9, "total": 8 * 10**9}, "time": {"capture": 0.5}, "pipeline": flow,
    }  # fmt: skip
    decoded = {"kind": "validation", "step": 2, "acceptance_length": 2.25, "acceptance_per_position": [0.75]}
    served = {"kind": "served", "step": 1, "acceptance_length": 2.0, "engine": "vllm"}
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    metrics.write_text("".join(json.dumps(each) + "\n" for each in (row, decoded, served)))
    figures = RunFigures(metrics, checkpoints, epochs=3)
    assert figures.sections() == [
        ["epoch 1 of 3", "loss 2.500", "lr 1.00e-03", "gradient 0.50"],
        ["simulated acceptance 1.75", "accuracy per position 0.75 0.50"],
        ["1,234 tokens/s", "2.00 s a step", "memory 2.00 of 8.0 GB"],
        ["waited 25%, 2 passes ahead in 5 MB", "engines 600 tokens/s, 75% busy, 2 MB in their stores"],
        ["decoded at step 2: acceptance length 2.25", "accepted per position 0.75"],
        ["served in vllm at step 1: acceptance length 2.00"],
        ["no checkpoint yet"],
    ]
    (checkpoints / "step_00000002").mkdir(parents=True)
    figures.look_again()
    assert figures.sections()[-1] == ["checkpoint of step 2, just now"]
