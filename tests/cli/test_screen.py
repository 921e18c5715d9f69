"""The live screen on a real pseudo-terminal, read by a small terminal of our own."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.screen import Above, Screen, bar, wrapped

_PIECE = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Terminal:
    """A pseudo-terminal and what is seen on it: every row since the beginning, the window being the last ones.

    It knows the control sequences that we send and no others.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.rows = [""]
        self.raw = self.broken = ""
        self._row = self._column = 0
        self.patch = pytest.MonkeyPatch()
        self._size(columns, rows)
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def used(self) -> None:
        """It is stderr from now on, of this test."""
        self.patch.setattr(sys, "stderr", self.stream)

    def resize(self, columns: int, rows: int) -> None:
        """As terminals do that break lines anew; the row of the cursor moves along."""
        above = "\n".join(self.rows[: self._row])
        broken = [line[at : at + columns] for line in above.split("\n") for at in range(0, max(1, len(line)), columns)]
        self._row, self.rows = len(broken) if self._row else 0, [*(broken if self._row else []), ""]
        self._size(columns, rows)

    def _size(self, columns: int, rows: int) -> None:
        self.columns, self.height = columns, rows
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def seen(self, until: Callable[[list[str]], bool] = lambda rows: True) -> list[str]:
        """All rows, once they are as awaited."""
        deadline = time.monotonic() + 20
        while True:
            rows = [row.rstrip() for row in self.rows]
            while rows and not rows[-1]:
                rows.pop()
            if until(rows) or time.monotonic() > deadline:
                return rows
            time.sleep(0.005)

    def close(self) -> list[str]:
        """What is seen in the end."""
        self.stream.flush()
        self.stream.close()
        self._reader.join(30)
        os.close(self.master)
        assert not self.broken, self.broken
        return self.seen()

    def _follow(self) -> None:
        begun = b""
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            begun += data
            text = begun.decode("utf-8", "ignore")
            if text.endswith("\x1b") or re.search(r"\x1b\[\d*$", text) or len(text.encode()) != len(begun):
                continue  # a sequence that is not whole
            begun = b""
            self.raw += text
            if self.broken:
                continue  # whoever writes must not wait for us
            try:
                for piece in _PIECE.finditer(text):
                    self._take(*piece.groups())
            except AssertionError as error:
                self.broken = str(error)

    def _take(self, number: str | None, letter: str | None, home: str, down: str, said: str) -> None:
        if letter == "A":
            assert int(number or 1) < self.height, "it climbs out of the window"
            self._row -= int(number or 1)
            assert self._row >= 0
        elif letter == "K":
            self.rows[self._row] = self.rows[self._row][: self._column]
        elif letter == "J":
            self.rows[self._row] = self.rows[self._row][: self._column]
            del self.rows[self._row + 1 :]
        elif letter is not None:
            assert letter == "m", letter
        elif home:
            self._column = 0
        elif down:
            self._row += 1
            if self._row == len(self.rows):
                self.rows.append("")
        else:
            for char in said:
                if self._column == self.columns:
                    self._take(None, None, "", "\n", "")
                    self._column = 0
                row = self.rows[self._row].ljust(self._column)
                self.rows[self._row] = row[: self._column] + char + row[self._column + 1 :]
                self._column += 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    made = Terminal(70, 12)
    made.patch = monkeypatch
    return made


class Figures(ProgressDisplay):
    def _details(self, stage: str) -> list[list[str]]:
        return [["loss 2.500", "simulated acceptance 1.75"], ["memory 2.00 of 8.0 GB"]] if stage == "train" else []


def test_one_screen_with_what_is_said_above_it(terminal: Terminal) -> None:
    terminal.used()
    announce("torchspec: before")
    with Figures() as progress:
        for done in range(0, 11):
            progress("train", done, 10)
        logging.getLogger("torchspec.core.x").warning("sample 7 is left out")
        announce("a line of ours")
        print("half a ", end="", file=sys.stderr)
        print("line\rof another bar", file=sys.stderr)
        progress("validate", 1, 4)
        running = terminal.seen(lambda rows: any(row.startswith("validate") for row in rows))
        progress("validate", 4, 4)
    assert sys.stderr is terminal.stream
    announce("torchspec: after")
    rows = terminal.close()
    assert rows[:4] == ["torchspec: before", "WARNING: sample 7 is left out", "a line of ours", "of another bar"]
    assert [row.partition(" ")[0] for row in running[4:]] == ["validate"]
    assert rows[4].startswith("train   ━━━━━━━━━━━━━━━━━━━━━━━━ 100%   10/10   0:0")
    assert rows[5:] == [
        "  loss 2.500   simulated acceptance 1.75", "  memory 2.00 of 8.0 GB", "torchspec: after",
    ]  # fmt: skip
    assert "\x1b[2J" not in terminal.raw  # nothing is wiped, so nothing flickers
    assert "\x1b[?" not in terminal.raw  # and no mode is left behind, whoever ends the process


def test_training_and_what_goes_on_within_it_are_both_there(terminal: Terminal) -> None:
    terminal.used()
    with Figures() as progress:
        progress("train", 5, 10)
        progress("validate", 1, 4)
        rows = terminal.seen(lambda rows: any(row.startswith("train") for row in rows) and len(rows) > 3)
        assert [row.split()[0] for row in rows] == ["validate", "train", "loss", "memory"]
    terminal.close()


def test_a_narrow_terminal_gets_more_lines_and_a_low_one_fewer(terminal: Terminal) -> None:
    terminal.used()
    terminal.resize(30, 4)
    with Figures() as progress:
        progress("train", 5, 10)
        rows = terminal.seen(lambda rows: len(rows) == 3)
    assert rows[:2] == ["train", "━━━━━━━━━━━━────────────  50%"]
    assert rows[2].startswith("5/10   0:")
    assert len(terminal.close()) == 3


@pytest.mark.parametrize("columns", [25, 47, 110])
def test_after_a_resize_nothing_is_left_of_the_old_screen(terminal: Terminal, columns: int) -> None:
    screen = Screen(terminal.stream)
    screen.say("WARNING: before")
    screen.paint(["x" * 50, "y" * 20, "z" * 59])
    terminal.seen(lambda rows: len(rows) == 4)
    terminal.resize(columns, 12)
    screen.paint(["new", "short"])
    screen.close()
    assert terminal.close() == ["WARNING: before", "new", "short"]


def test_an_interrupt_leaves_a_clean_terminal(terminal: Terminal) -> None:
    terminal.used()

    def interrupted() -> None:
        with Figures() as progress:
            progress("train", 5, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is terminal.stream
    announce("torchspec: interrupted")
    assert terminal.close()[-2:] == ["  memory 2.00 of 8.0 GB", "torchspec: interrupted"]


@pytest.mark.parametrize("name", ["NO_COLOR", "CI", "TERM"])
def test_who_wants_plain_lines_gets_them_on_a_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    terminal.used()
    monkeypatch.setenv(name, "dumb")
    with Figures() as progress:
        progress("train", 1, 10)
    assert [row[20:] for row in terminal.close()] == ["train 1/10"]
    assert "\x1b" not in terminal.raw


def test_another_process_progress_moves_the_screen(terminal: Terminal) -> None:
    terminal.used()
    with Figures() as progress:
        for line in (
            "2026-01-02 03:04:05 tokenise 1.5/2.0 MB",
            "2026-01-02 03:04:05 train 3/10, loss 2.500",
            "2026-01-02 03:04:05 WARNING: sample 3/4 is left out",
            "not a line of progress",
        ):
            progress.say(line)
        rows = terminal.seen(lambda rows: len(rows) == 5)
    assert rows[:2] == ["2026-01-02 03:04:05 WARNING: sample 3/4 is left out", "not a line of progress"]
    assert "30%" in rows[2]
    stage = progress._stages["tokenise"]
    assert (stage.done, stage.total) == (1_500_000, 2_000_000)
    terminal.close()


def test_a_terminal_that_goes_away_stops_nothing(terminal: Terminal) -> None:
    terminal.used()
    with Figures() as progress:
        os.close(os.dup(terminal.master))
        terminal.stream.flush()
        progress("train", 1, 10)
        screen = Screen(open(os.devnull, "w"))  # noqa: SIM115
        screen._stream.close()
        screen.paint(["gone"])
    terminal.close()


def test_fields_side_by_side_and_bars() -> None:
    assert wrapped(["a" * 5, "b" * 5, "c" * 5], 20) == ["  aaaaa   bbbbb", "  ccccc"]
    assert (bar(0.5, 4, "utf-8"), bar(2.0, 4, "ascii"), bar(0.0, 2, None)) == ("━━──", "####", "--")


def test_what_others_print_is_no_terminal_to_them(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as stream:
        above = Above(Screen(stream), stream)
        assert not above.isatty()
        assert above.encoding.lower() == "utf-8"
