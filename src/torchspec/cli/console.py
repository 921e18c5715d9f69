"""What people see while work goes on: a bar on a terminal, a line now and then in a log. All of it on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from torchspec.core.errors import TorchspecError

_SECONDS_BETWEEN_LINES = 5.0
_TRAINING = "train"  # the trainer's name for its stage


class ProgressDisplay:
    """Called with (stage, done, total); a total of 0 means unknown. Silent on ranks other than the first.

    `figures` says in a few words how a training stands; it is asked when its progress is shown. Log records of
    torchspec appear above the bars.
    """

    def __init__(self, *, silent: bool = False, figures: Callable[[], str] = str) -> None:
        self._console = Console(stderr=True)
        self._handler = self._log_handler()
        self._silent = silent
        self._figures = figures
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()
        self._last: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> ProgressDisplay:
        logger = logging.getLogger("torchspec")
        logger.addHandler(self._handler)
        logger.setLevel(logging.ERROR if self._silent else logging.INFO)
        if self._console.is_terminal and not self._silent:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("torchspec").removeHandler(self._handler)
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._silent:
            return
        if self._bars is None:
            self._log(stage, done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        text = f"{stage} {self._current(stage)}"
        self._bars.update(self._tasks[stage], completed=done, total=total or None, description=text)

    def _log_handler(self) -> logging.Handler:
        if self._console.is_terminal:
            return RichHandler(console=self._console, show_time=False, show_path=False)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        return handler

    def _log(self, stage: str, done: int, total: int) -> None:
        """The first and the last report of a stage, and one every few seconds between them."""
        now = time.monotonic()
        last_stage, last_time = self._last
        if stage == last_stage and done != total and now - last_time < _SECONDS_BETWEEN_LINES:
            return
        self._last = (stage, now)
        count = f"{done}/{total}" if total else str(done)
        line = f"[{now - self._started:6.1f}s] {stage} {count} {self._current(stage)}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def _current(self, stage: str) -> str:
        return self._figures() if stage == _TRAINING else ""


def announce(text: str) -> None:
    """A line before anything slow is imported, so that a command shows life in its first second."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = True) -> None:
    """A table on stdout; the first column is text, the others are figures or text too."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if figures and number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table, highlight=False)


def write_whole(path: Path, text: str) -> None:
    """A file of results, whole or not at all; TorchspecError when it cannot be written."""
    aside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise TorchspecError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
