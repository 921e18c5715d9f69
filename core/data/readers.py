"""Files of rows as streams of decoded objects, each with its place; nothing is known here of what a row means.

JSON Lines is read line by line, a JSON array element by element, Parquet batch by batch, so memory does not grow
with the file. Whatever cannot be decoded becomes a `Broken` with a reason, and reading goes on behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from torchspec.core.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_CHUNK = 1 << 20  # characters of a JSON array decoded at a time
_PARQUET_ROWS = 256
_BLANK = 4096  # bytes that may be blank at the beginning of a file

# Undecodable bytes become lone surrogates, as half an escaped pair does, and are refused where text is checked:
# one broken row then costs one row.
_DECODING = "surrogateescape"


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One value of a file. `line` counts from 1; in Parquet it is the number of the row."""

    line: int
    value: Any


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Something at `line` that is no value at all."""

    line: int
    reason: str


Advance = Callable[[int], None]  # told how many more bytes have been read


def check_files(files: Sequence[Path]) -> int:
    """Total size in bytes; DataError naming every file that is missing, empty, unreadable or of unknown kind."""
    problems, total = [], 0
    for file in files:
        try:
            size = _size(file)
        except (DataError, OSError) as error:
            problems.append(str(error) if isinstance(error, DataError) else f"{file}: {error.strerror or error}")
        else:
            total += size
    if not files:
        problems.append("no data file was given")
    if problems:
        raise DataError("the data cannot be read:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return total


def read_values(file: Path, advance: Advance) -> Iterator[Decoded | Broken]:
    """Every value of one file that `check_files` has accepted."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(file, advance)
        elif suffix == ".json" and not _is_lines(file):
            yield from _json(file, advance)
        else:
            yield from _json_lines(file, advance)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _size(file: Path) -> int:
    if not file.exists():
        raise DataError(f"{file} does not exist")
    if not file.is_file():
        raise DataError(f"{file} is not a file: name the files in it")
    if file.suffix.lower() not in SUFFIXES:
        raise DataError(f"{file} is of an unknown kind ({file.suffix or 'no suffix'}): one of {', '.join(SUFFIXES)}")
    size = file.stat().st_size
    with file.open("rb") as stream:  # of a large file too: that it cannot be read is to be known now
        if not stream.read(_BLANK).strip() and size <= _BLANK:
            raise DataError(f"{file} is empty")
    return size


def _is_lines(file: Path) -> bool:
    """Many .json files hold one object per line: so does this one if its first line is a whole object."""
    with file.open("rb") as stream:
        if stream.read(_BLANK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return False  # the whole list may stand in one line, which must not be read at once
        stream.seek(0)
        first = next((line for line in stream if line.strip()), b"")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig", _DECODING)), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    return f"not valid JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else f"not valid JSON: {error}"


def _json_lines(file: Path, advance: Advance) -> Iterator[Decoded | Broken]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            advance(len(raw))
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8", _DECODING).strip()
            if not text:
                continue
            try:
                yield Decoded(line=number, value=json.loads(text))
            except (ValueError, RecursionError) as error:
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield Broken(line=number, reason=_reason(error) + column)


class _Window:
    """A text file seen through a window that grows on demand and forgets what lies behind `at`."""

    def __init__(self, stream: TextIOWrapper, advance: Advance) -> None:
        self.text, self.at, self.line = "", 0, 1
        self._stream, self._advance = stream, advance

    def more(self) -> bool:
        """Read on; by doubling, so that retrying an element costs no more than reading it twice. False at the end."""
        chunk = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._advance(len(chunk.encode("utf-8", _DECODING)))
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self, skip: re.Pattern[str]) -> str:
        """The next character that is not to be skipped; empty at the end."""
        while True:
            passed = skip.match(self.text, self.at)
            self.move(passed.end() if passed else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


_SPACE, _SEPARATOR = re.compile(r"[ \t\r\n]+"), re.compile(r"[ \t\r\n,]+")
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}"]', re.DOTALL)
_BARE_END = re.compile(r"[,\]\[{}]")


def _json(file: Path, advance: Advance) -> Iterator[Decoded | Broken]:
    """The elements of a top-level array, or of values written one after another."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig", errors=_DECODING, newline="") as stream:
        window = _Window(stream, advance)
        is_array = window.peek(_SPACE) == "["
        if is_array:
            window.move(window.at + 1)
        while following := window.peek(_SEPARATOR):
            if following == "]" and is_array:
                window.move(window.at + 1)
                if window.peek(_SPACE):
                    yield Broken(line=window.line, reason="not valid JSON: text after the end of the list")
                return
            yield _element(window, decoder)
        if is_array:
            yield Broken(line=window.line, reason="not valid JSON: the file ends before its list does")


def _element(window: _Window, decoder: json.JSONDecoder) -> Decoded | Broken:
    """The value at the window's position, or what is wrong with it; the position moves behind it either way."""
    line = window.line
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            reason = _reason(error)
        else:
            # A number at the window's edge may go on behind it; an object is known to be whole.
            if end == len(window.text) and isinstance(value, (int, float)) and window.more():
                continue
            window.move(end)
            return Decoded(line=line, value=value)
        end = _extent(window.text, window.at)
        if end:
            window.move(end)
            return Broken(line=line, reason=reason)
        if not window.more():
            window.move(len(window.text))
            return Broken(line=line, reason=reason + "; nothing behind it could be read")


def _extent(text: str, start: int) -> int:
    """Where the malformed value at `start` ends, by its brackets; 0 if it does not end within `text`."""
    if text[start] == '"':
        whole = _MARK.match(text, start)
        return whole.end() if whole and len(whole.group()) > 1 else 0
    if text[start] not in "[{":
        stop = _BARE_END.search(text, start + 1)
        return stop.start() if stop else 0
    depth = 0
    for match in _MARK.finditer(text, start):
        mark = match.group()
        if mark == '"':  # a string that does not end
            return 0
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
            if depth == 0:
                return match.end()
    return 0


def _parquet(file: Path, advance: Advance) -> Iterator[Decoded | Broken]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"reading {file} needs pyarrow, which is not installed: pip install 'torchspec[parquet]'"
        ) from error
    size, number, advanced = file.stat().st_size, 0, 0
    try:
        with parquet.ParquetFile(file) as table:
            rows = table.metadata.num_rows
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Decoded(line=number, value=value)
                done = size * number // max(rows, 1)
                advance(done - advanced)
                advanced = done
    except (pyarrow.ArrowException, OSError) as error:
        # Before the first row the file is no Parquet file; later a part of it is damaged.
        if number == 0:
            raise DataError(f"{file} is not a readable Parquet file: {error}") from error
        yield Broken(line=number + 1, reason=f"damaged Parquet data, the rest of the file cannot be read: {error}")
