"""A run of drafts whose positions are drawn anew in every epoch, stopped in one of them and continued: to the last bit
the run that was never disturbed. Of EAGLE-3 tests/core/training/test_resume.py holds as much, with harder kills."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.training.checkpoint import load_draft_state
from torchspec.core.training.checkpoint_files import directory_of, steps_on_disk

END, STOPPED = 8, 3
SMALL = {"block_size": 4, "num_layers": 1, "num_anchors": 3}
CASES: dict[str, dict[str, Any]] = {
    "dflash": {"algorithm": "dflash", "draft": SMALL},
    "dflash, d-pace, packed": {
        "algorithm": "dflash",
        "draft": {**SMALL, "weighting": "dpace", "objective": {"lk_lambda": 1.0, "ground_truth": 0.2}},
        "train": {"batch_size": 4, "tokens_per_rank": 90, "checkpoint_every": 3},
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_stopped_run_continues_to_the_last_bit(
    case: dict[str, Any], make_config: Any, tmp_path: Path, runs: ModuleType
) -> None:
    config, _ = make_config(tmp_path / "base", **case)
    values = config.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    words = ("train.epochs=2", "data.validation=[]", "data.max_length=64", "train.lr=1e-2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.alone(values, whole, *words)

    def stop(stage: str, step: int, total: int) -> None:
        if (stage, step) == ("train", STOPPED):
            os.kill(os.getpid(), signal.SIGTERM)

    runs.alone(values, parts, *words, progress=stop)
    stopped = steps_on_disk(parts / "checkpoints")[-1]
    assert STOPPED <= stopped < END
    assert not (parts / "draft").exists()
    runs.alone(values, parts, *words)

    figures = runs.figures(whole)
    assert runs.figures(parts) == figures
    assert [row[0] for row in figures] == list(range(1, END + 1))
    assert len({row[1] for row in figures}) == END
    (_, mine), (_, theirs) = (load_draft_state(directory_of(run / "checkpoints", END)) for run in (parts, whole))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
