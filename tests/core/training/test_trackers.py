"""TensorBoard gets every number of a row under its kind and step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchspec.core.errors import ConfigError
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.trackers import TensorBoard, check_tensorboard


def test_rows_become_scalars(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tracker=TensorBoard(tmp_path / "board", after_step=0))
    with log:
        log.write({"kind": "train", "step": 3, "loss": 2.5, "accuracy": [0.5, 0.25], "time": {"data": 0.1}, "lr": None})
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/accuracy/1", "train/accuracy/2", "train/time.data"} <= tags
    assert "train/lr" not in tags
    assert [(event.step, event.value) for event in events.Scalars("train/accuracy/2")] == [(3, 0.25)]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_missing_tensorboard_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"train.tensorboard: tensorboard is not installed[\s\S]*torchspec\[trackers\]"
    ):
        check_tensorboard()
