"""Progress in logs: early, seldom, and complete."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from torchspec.cli import console
from torchspec.cli.console import ProgressDisplay
from torchspec.cli.training import latest_figures


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]


def test_a_log_gets_the_first_and_the_last_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as progress:
        for done in range(1001):
            progress("tokenise", done, 1000)
        progress("capture", 7, 0)
    assert lines(capsys) == ["tokenise 0/1000", "tokenise 1000/1000", "capture 7"]


def test_a_slow_stage_reports_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with ProgressDisplay() as progress:
        for done in range(10):
            progress("train", done, 100)
    assert lines(capsys) == ["train 0/100", "train 3/100", "train 6/100", "train 9/100"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(silent=True) as progress:
        progress("train", 1, 2)
        logging.getLogger("torchspec.core.x").warning("twice is too often")
    assert lines(capsys) == []


def test_log_records_are_shown_and_the_handler_goes(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger("torchspec").handlers)
    with ProgressDisplay():
        logging.getLogger("torchspec.core.x").info("resuming from step 7")
    assert "resuming from step 7" in capsys.readouterr().err
    assert logging.getLogger("torchspec").handlers == before


def test_training_shows_its_newest_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert latest_figures(metrics) == ""
    row = {"kind": "train", "loss": 2.5, "simulated_acceptance_length": 1.75, "tokens_per_second": 1234.5}
    text = json.dumps({**row, "loss": 9.0}) + "\n" + json.dumps(row) + "\n" + json.dumps({"kind": "validation"}) + "\n"
    metrics.write_text(text + '{"kind": "tra')
    with ProgressDisplay(figures=lambda: latest_figures(metrics)) as progress:
        progress("train", 1, 2)
        progress("other", 1, 2)
    assert lines(capsys) == ["train 1/2 loss 2.500, simulated acceptance 1.75, 1234 tokens/s", "other 1/2"]
    metrics.write_text(json.dumps({**row, "simulated_acceptance_length": None}) + "\n")
    assert latest_figures(metrics) == "loss 2.500, 1234 tokens/s"
