"""What a run directory holds, read so that its size does not matter and its damage is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchspec.core.errors import TorchspecError
from torchspec.core.report.values import Row, mapping, real
from torchspec.core.training.metrics import is_row

logger = logging.getLogger(__name__)

METRICS, EVALUATION = "metrics.jsonl", "eval.json"
KEPT = 500
"""Training rows that are held, at even distances: no chart shows more."""
LARGEST_FILE = 2**26
"""Bytes of a file beside the metrics: a larger one is none of a run's."""
LAST_STEP = 2**53


@dataclass(kw_only=True)
class Totals:
    """Over all training rows, not only those that are held. `time`: phase -> seconds; `peak`: bytes."""

    rows: int = 0
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)
    peak: float | None = None
    quarantined: int = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.seconds += real(row.get("step_seconds")) or 0.0
        for name, seconds in mapping(row.get("time")).items():
            self.time[name] = self.time.get(name, 0.0) + max(0.0, real(seconds) or 0.0)
        peak = real(mapping(row.get("memory")).get("peak"))
        if peak is not None:
            self.peak = max(self.peak or 0.0, peak)
        self.quarantined += len(mapping(row.get("quarantined")))


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The parts of a run directory that exist; a run may have stopped anywhere.

    train    at most 2 `KEPT` + 1 training rows, every `stride`-th of them and the last
    notes    what is damaged or foreign and left out, in words
    """

    directory: Path
    train: list[Row] = field(default_factory=list)
    stride: int = 1
    totals: Totals = field(default_factory=Totals)
    validation: list[Row] = field(default_factory=list)
    served: list[Row] = field(default_factory=list)
    evaluation: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    ledger: Row = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class _Thinned:
    """Every `stride`-th of the rows that are added, and the last; the stride doubles as they become many."""

    def __init__(self) -> None:
        self.stride, self._count = 1, 0
        self._kept: list[Row] = []
        self._last: Row | None = None

    def add(self, row: Row) -> None:
        if self._count % self.stride == 0:
            self._kept.append(row)
            if len(self._kept) == 2 * KEPT:
                self._kept, self.stride = self._kept[::2], 2 * self.stride
        self._count, self._last = self._count + 1, row

    def rows(self) -> list[Row]:
        if self._last is None or self._kept[-1] is self._last:
            return self._kept
        return [*self._kept, self._last]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; lines of metrics.jsonl that are unfinished or no rows are passed over, and counted.

    Raises TorchspecError when the directory is no run: neither metrics.jsonl nor eval.json is in it.
    """
    metrics = run_dir / METRICS
    if not metrics.is_file() and not (run_dir / EVALUATION).is_file():
        raise TorchspecError(
            f"{run_dir} is not a run directory: it holds neither metrics.jsonl nor eval.json. "
            "Name the --output of a `torchspec train`"
        )
    notes: list[str] = []
    train, totals = _Thinned(), Totals()
    others: dict[str, list[Row]] = {"validation": [], "served": []}
    for row in _rows(metrics, notes):
        if row["kind"] == "train":
            train.add(row)
            totals.add(row)
        elif row["kind"] in others:
            others[row["kind"]].append(row)
    record = RunRecord(
        directory=run_dir,
        train=train.rows(),
        stride=train.stride,
        totals=totals,
        validation=others["validation"],
        served=sorted(others["served"], key=lambda row: int(row["step"])),
        evaluation=_object(run_dir / EVALUATION, json.loads, notes),
        config=_object(run_dir / "config.yaml", yaml.safe_load, notes),
        environment=_object(run_dir / "environment.json", json.loads, notes),
        data=_object(run_dir / "data.json", json.loads, notes),
        ledger=_object(run_dir / "ledger.json", json.loads, notes),
        notes=tuple(notes),
    )
    for note in notes:
        logger.warning("%s: %s", run_dir, note)
    return record


def _rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """Of metrics.jsonl, in order. A last line without its end is what a process is writing, or a killed one was."""
    if not path.is_file():
        return
    lines = foreign = 0
    try:
        with path.open("rb") as file:
            for line in file:
                lines += 1
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    foreign += line.endswith(b"\n")
                    continue
                if is_row(row) and 0 <= row["step"] < LAST_STEP:
                    yield row
                else:
                    foreign += 1
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
    if foreign:
        notes.append(f"{path.name}: {foreign:,} of {lines:,} lines are no rows of a run and left out of the report")


def _object(path: Path, parse: Callable[[str], Any], notes: list[str]) -> Row:
    """What a file beside the metrics holds, as JSON would have it; the page goes without one that is damaged."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        loaded = json.loads(json.dumps(parse(path.read_text(encoding="utf-8")), default=str, skipkeys=True))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} is damaged and left out of the report: {' '.join(str(error).split())}")
        return {}
    if not isinstance(loaded, dict):
        notes.append(f"{path.name} is damaged and left out of the report: a {type(loaded).__name__}")
        return {}
    return loaded
