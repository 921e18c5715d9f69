"""A few lines at the bottom of a terminal that are written over and over; whatever else is said goes above them.

Lines are overwritten in place and never wiped first, each time in one write: nothing flickers. The cursor stays visible
below them, so a process that is killed leaves a usable terminal.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from rich.cells import cell_len, set_cell_size

from torchspec.core.settings import plain_output

_TO_LINE_END, _BELOW, _BOLD, _PLAIN = "\x1b[K", "\x1b[J", "\x1b[1m", "\x1b[0m"
NO_SIZE = (80, 24)


class Screen:
    """`stream` is a terminal's. Safe from several threads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._widths: list[int] = []  # of the lines that stand there
        self._lines: list[str] = []
        self._lock = threading.RLock()

    def size(self) -> tuple[int, int]:
        """(columns, rows) as they are now."""
        with suppress(OSError, ValueError, io.UnsupportedOperation):
            columns, rows = os.get_terminal_size(self._stream.fileno())
            if columns > 0 and rows > 0:
                return columns, rows
        return NO_SIZE

    def paint(self, lines: Sequence[str]) -> None:
        """Put these in the place of those that are there; what does not fit is cut, at the right and at the bottom.
        The first is bold."""
        with self._lock:
            self._lines = list(lines)
            self._write("")

    def say(self, text: str) -> None:
        """Lines that stay, above those that are painted."""
        with self._lock:
            self._write("".join(f"{line}{_TO_LINE_END}\r\n" for line in text.splitlines()))

    def close(self) -> None:
        """The last lines stay."""
        with self._lock:
            self._widths, self._lines = [], []

    def _write(self, above: str) -> None:
        columns, rows = self.size()
        up = self._height(columns, rows)
        # One column stays free: a full line would leave the cursor between two lines.
        shown = [_fitted(line, columns - 1) for line in self._lines[: max(1, rows - 1)]]
        painted = [f"{_BOLD}{line}{_PLAIN}" if place == 0 else line for place, line in enumerate(shown)]
        text = "\r" + (f"\x1b[{up}A" if up else "") + above
        text += "".join(f"{line}{_TO_LINE_END}\r\n" for line in painted) + _BELOW
        self._widths = [cell_len(line) for line in shown]
        with suppress(OSError, ValueError):  # a terminal that went away
            self._stream.write(text)
            self._stream.flush()

    def _height(self, columns: int, rows: int) -> int:
        """Rows that the painted lines take now: a terminal made narrower has broken those that no longer fit."""
        return min(rows - 1, sum(max(1, -(-width // columns)) for width in self._widths))


def _fitted(line: str, columns: int) -> str:
    return line if cell_len(line) <= columns else set_cell_size(line, columns)


class Above(io.TextIOBase):
    """Stands for stdout or stderr while lines are painted: whole lines go above them."""

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen, self.stream = screen, stream
        self._begun = ""
        self._own = threading.Lock()

    def write(self, text: str) -> int:
        with self._own:
            *whole, self._begun = (self._begun + text).split("\n")
        if whole:
            # What was meant to overwrite itself, such as a bar of somebody else's, counts by its last form.
            self._screen.say("\n".join(line.rsplit("\r", 1)[-1] for line in whole))
        return len(text)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """The line that nobody ended."""
        if self._begun.strip():
            self.write("\n")

    def isatty(self) -> bool:
        return False  # so that others draw no bars of their own among ours

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding or "utf-8"


def wrapped(fields: Sequence[str], columns: int, indent: str = "  ") -> list[str]:
    """Fields side by side, as many to a line as there is room for."""
    lines: list[str] = []
    for each in fields:
        if lines and cell_len(lines[-1]) + 3 + cell_len(each) < columns:
            lines[-1] += f"   {each}"
        else:
            lines.append(indent + each)
    return lines


def bar(share: float, width: int, encoding: str | None) -> str:
    """`share` from 0 to 1."""
    done, left = ("━", "─") if "utf" in (encoding or "").lower() else ("#", "-")
    filled = round(min(1.0, max(0.0, share)) * width)
    return done * filled + left * (width - filled)


def terminal() -> bool:
    """Whether stderr is one, for which nobody asked to be left alone."""
    return sys.stderr.isatty() and not plain_output()
