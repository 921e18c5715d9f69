"""metrics.jsonl: one JSON object per line, one history.

Rows have a `kind`, "train" or "validation", and a `step`. A resumed run first cuts the rows after its checkpoint's
step, so the file never tells two stories about one step. Only rank 0 writes; values are sums or maxima over all ranks.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torchspec.core.errors import TorchspecError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the same rows; see core/training/tracking.py."""

    def write(self, row: dict[str, Any]) -> None: ...


class MetricsLog:
    """Appends rows, each flushed as a whole line; `directory` None is a log that keeps nothing (other ranks)."""

    def __init__(
        self, path: Path | None, *, after_step: int = 0, validated: bool = False, tracker: Tracker | None = None
    ) -> None:
        """Continue `path` behind `after_step`; later rows, and a line that was cut short, are removed.

        `validated` says whether the validation of `after_step` belongs to what the run continues from; if not, it
        will run (again) and its row goes too. `tracker` gets every row as well.
        """
        self._file: RawIOBase | None = None
        self._path = path
        self._tracker = tracker
        if path is None:
            return
        try:
            if path.exists():
                _cut(path, after_step, validated)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise TorchspecError(f"cannot write {path}: {error.strerror}") from error

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        if self._tracker is not None:
            self._tracker.write(row)
        line = json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"
        data = line.encode()
        try:
            # One unbuffered write per row: nothing is left behind that a later close would try to write again.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TorchspecError(
                f"cannot write {self._path}: {error.strerror}. The newest checkpoint is intact; "
                "free some space and start the same command again to resume from it"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become null, in nested values too."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_row(value: Any) -> bool:
    """Whether a line's JSON is a row: an object that says its kind and step."""
    return isinstance(value, dict) and isinstance(value.get("kind"), str) and type(value.get("step")) is int


def _cut(path: Path, after_step: int, validated: bool) -> None:
    """Keep the rows up to `after_step`; the file is replaced whole, so a crash here loses nothing."""
    kept: list[str] = []
    foreign = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not is_row(row):
            foreign += 1
            continue
        repeated = row["kind"] == "validation" and row["step"] == after_step and not validated
        if row["step"] <= after_step and not repeated:
            kept.append(line + "\n")
    if foreign:
        logger.warning("%s: %d lines that are no rows of a run (`kind` and `step`) are removed", path, foreign)
    aside = path.with_name(f".{path.name}.cut")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
