"""What people see while work goes on: one screen on a terminal, a line now and then in a log. All of it on stderr."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table

from torchspec.cli.screen import Above, Screen, bar, terminal, wrapped
from torchspec.core.errors import TorchspecError

TRAINING = "train"
"""The trainer's name for its stage."""
SECONDS_BETWEEN_LINES, MOST_SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES = 5.0, 300.0, 0.05
"""In a log: a line of a stage comes when the stage has gone on for a twentieth longer."""
TICK = 0.5
LEAST_BETWEEN_PAINTS = 0.1
BAR = 24
_CLOCK = "%Y-%m-%d %H:%M:%S"
_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    r"(?P<stage>[a-z][^:]*?) (?P<done>[\d.]+)(?:/(?P<total>[\d.]+))?(?P<unit> [kM]B)?(?:,.*)?"
)
_IN_BYTES = ("hash data", "tokenise", "check cache")
"""Stages of which the parts done are bytes of files."""
_UNITS = {" kB": 10**3, " MB": 10**6}


@dataclass(kw_only=True)
class _Stage:
    """What is done of a stage. `base`: when it was done how far, from which its pace is taken; the first piece, which
    may have had something to wait for, is left out."""

    name: str
    done: int
    total: int
    began: float
    base: tuple[float, int] | None = None
    told: float | None = None
    ended: float | None = None

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    def advance(self, done: int, now: float) -> None:
        if done > self.done:
            self.base = self.base or (now, done)
            self.done = done
            self.ended = now if self.finished else None

    def seconds(self, now: float) -> float:
        """So far, or in all."""
        return (now if self.ended is None else self.ended) - self.began

    def seconds_left(self, now: float) -> float | None:
        if self.base is None or self.finished or not self.total:
            return None
        since, before = self.base
        made = self.done - before
        return None if made <= 0 or now <= since else (self.total - self.done) * (now - since) / made


class ProgressDisplay:
    """Called with (stage, done, total); a total of 0 means unknown. Silent on ranks other than the first.

    On a terminal, a few lines that are painted over and over; elsewhere, and where NO_COLOR, CI or TERM=dumb ask for
    it, plain lines: the first and the last report of a stage, and some between them, also while nothing is reported.
    Log records of torchspec, and what anybody prints meanwhile, appear above the painted lines.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._screen: Screen | None = None
        self._handler = logging.Handler()
        self._handler.emit = self._emit  # type: ignore[method-assign]
        self._stages: dict[str, _Stage] = {}
        self._latest = ""
        self._painted = 0.0
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._streams: dict[str, Above] = {}

    def __enter__(self) -> Self:
        logger = logging.getLogger("torchspec")
        logger.addHandler(self._handler)
        logger.setLevel(logging.ERROR if self._silent else logging.INFO)
        if self._silent:
            return self
        if terminal():
            self._screen = Screen(sys.stderr)
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream.isatty():
                    self._streams[name] = Above(self._screen, stream)
                    setattr(sys, name, self._streams[name])
        self._ending.clear()
        threading.Thread(target=self._tick, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        logging.getLogger("torchspec").removeHandler(self._handler)
        with self._lock:
            if self._screen is None:
                return
            for name, above in self._streams.items():
                above.finish()
                if getattr(sys, name) is above:
                    setattr(sys, name, above.stream)
            self._streams.clear()
            self._paint()
            self._screen.close()
            self._screen = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._silent:
            return
        with self._lock:
            now = time.monotonic()
            known = self._noted(stage, done, total, now)
            if self._screen is None:
                if known.told is None or known.finished or self._due(known, now):
                    self._tell(known, now)
            elif known.finished or now - self._painted > LEAST_BETWEEN_PAINTS:
                self._paint()

    def say(self, line: str) -> None:
        """A line of another process's display: its progress becomes this one's, the rest is shown as it is."""
        found = _LINE.fullmatch(line)
        if found is None or self._screen is None:
            announce(line)
        else:
            unit = _UNITS.get(found["unit"], 1)
            self(found["stage"], *(round(float(found[name] or 0) * unit) for name in ("done", "total")))

    @contextmanager
    def phase(self, stage: str) -> Iterator[None]:
        """Around something of which nobody knows how far it is."""
        self(stage, 0, 1)
        yield
        self(stage, 1, 1)

    def _current(self, stage: str) -> str:
        """In a few words how a stage stands; asked when its progress is shown."""
        return ""

    def _details(self, stage: str) -> list[list[str]]:
        """The same for a screen, in fields: each list begins a line."""
        text = self._current(stage)
        return [[text]] if text else []

    def _refresh(self, now: float) -> None:
        """Before the screen is painted."""

    def _noted(self, name: str, done: int, total: int, now: float) -> _Stage:
        self._latest = name
        known = self._stages.get(name)
        if known is None or done < known.done or (known.finished and done == known.done == total):
            if known is not None and known.finished and done == known.done:
                return known  # told twice that it has ended
            known = self._stages[name] = _Stage(name=name, done=done, total=total, began=now)
            return known
        known.total = total
        known.advance(done, now)
        return known

    def _tick(self) -> None:
        while not self._ending.wait(TICK):
            with self._lock:
                now = time.monotonic()
                if self._ending.is_set():
                    return
                if self._screen is not None:
                    self._paint()
                    continue
                for stage in self._shown():
                    if not stage.finished and self._due(stage, now):
                        self._tell(stage, now)

    def _shown(self) -> list[_Stage]:
        """The training, while it lasts, and what goes on within it or instead of it."""
        names = dict.fromkeys((self._latest, TRAINING))
        found = [self._stages[name] for name in names if name in self._stages]
        running = [stage for stage in found if not stage.finished]
        return running or found[-1:]

    @staticmethod
    def _due(stage: _Stage, now: float) -> bool:
        if stage.told is None:
            return True
        pause = max(SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - stage.began))
        return now - stage.told >= min(pause, MOST_SECONDS_BETWEEN_LINES)

    def _tell(self, stage: _Stage, now: float) -> None:
        stage.told = now
        left = stage.seconds_left(now)
        parts = [f"{stage.name} {_count(stage)}"]
        parts += [f"{span(stage.seconds(now))} so far"] if stage.total <= 1 and stage.seconds(now) >= 1 else []
        parts += [] if left is None else [f"{span(left)} left"]
        parts += [text] if (text := self._current(stage.name)) else []
        print(time.strftime(_CLOCK), ", ".join(parts), file=sys.stderr, flush=True)

    def _paint(self) -> None:
        assert self._screen is not None
        now = self._painted = time.monotonic()
        self._refresh(now)
        columns, _ = self._screen.size()
        lines: list[str] = []
        for stage in self._shown():
            lines += wrapped(self._header(stage, now), columns, indent="")
            for fields in self._details(stage.name):
                lines += wrapped(fields, columns)
        if lines:
            self._screen.paint(lines)

    def _header(self, stage: _Stage, now: float) -> list[str]:
        fields = [stage.name]
        if stage.total > 1:
            share = stage.done / stage.total
            encoding = getattr(sys.stderr, "encoding", None)
            fields += [f"{bar(share, BAR, encoding)} {share:4.0%}", _count(stage)]
        elif stage.total == 0:
            fields.append(_count(stage))
        fields.append(span(stage.seconds(now)))
        left = stage.seconds_left(now)
        return fields if left is None else [*fields, f"{span(left)} left"]

    def _emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname}: {self._handler.format(record)}"
        if self._screen is not None:
            self._screen.say(text)
        else:
            print(time.strftime(_CLOCK), text, file=sys.stderr, flush=True)


def _count(stage: _Stage) -> str:
    if stage.name in _IN_BYTES:
        name, unit = next((name, unit) for name, unit in _UNITS.items() if stage.total < 10**3 * unit or name == " MB")
        return f"{stage.done / unit:.1f}/{stage.total / unit:.1f}{name}"
    return f"{stage.done}/{stage.total}" if stage.total else str(stage.done)


def span(seconds: float) -> str:
    """3:07, 1:02:03, 2d 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not hours + days:
        return f"{minutes}:{rest:02d}"
    return f"{f'{days}d ' if days else ''}{hours}:{minutes:02d}:{rest:02d}"


def counted(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


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
