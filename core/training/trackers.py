"""Metrics for TensorBoard, beside metrics.jsonl. Rank 0 only."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Raise ConfigError when TensorBoard is asked for and not installed: before the run, not in it."""
    if importlib.util.find_spec("tensorboard") is None:
        message, remedy = "tensorboard is not installed", 'pip install "torchspec[trackers]"'
        raise ConfigError([Problem(field="train.tensorboard", value=True, message=message, remedy=remedy)])


class TensorBoard:
    """Numbers of each row as scalars `kind/name` at the row's step; of a list, one per position (from 1).

    A resumed run hides what an earlier session wrote behind `after_step` (TensorBoard's own purge).
    """

    def __init__(self, directory: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            for tag, number in _numbers(name, value):
                self._writer.add_scalar(f"{row['kind']}/{tag}", number, row["step"])

    def close(self) -> None:
        self._writer.close()


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _numbers(f"{name}.{key}", inner)]
    if isinstance(value, list | tuple):
        return [pair for place, inner in enumerate(value, 1) for pair in _numbers(f"{name}/{place}", inner)]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return [(name, float(value))] if number else []
