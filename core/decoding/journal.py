"""An append-only JSON Lines file of finished conversations that survives being killed at any byte.

A conversation may take several rows; `metadata.part` of `metadata.parts` says which a row is. On opening, whatever
follows the last complete conversation (a torn line, rows without their fellows) is cut off, so that a continued run
writes the very bytes that an uninterrupted one would have.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torchspec.core.errors import DataError

Entry = dict[str, Any]

_OPENING = b'{"id": "'


class Journal:
    """`finished` holds the ids of the conversations that are in the file, with the digest of what each was asked.

    `identity` is what must be equal in every row's metadata for rows to belong together; DataError when the file
    holds others, or something that was not written here.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = dict(identity)
        self.finished: dict[str, str | None] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        with ExitStack() as stack:
            stack.callback(self._file.close)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{path} is being written by another run: wait, or name another output") from None
            self._file.truncate(self._read())
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, conversations: Iterable[list[Entry]]) -> None:
        """Write the rows of finished conversations, durably. DataError when the disk refuses."""
        text, finished = bytearray(), {}
        for rows in conversations:
            for number, row in enumerate(rows, start=1):
                metadata = {**row["metadata"], "part": number, "parts": len(rows), **self._identity}
                text += json.dumps({**row, "metadata": metadata}, ensure_ascii=False).encode() + b"\n"
            finished[str(rows[-1]["metadata"]["conversation"])] = rows[-1]["metadata"].get("prompt")
        try:
            left = memoryview(text)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.finished |= finished

    def holds(self, conversation: str, prompt: str) -> bool:
        """Whether it is finished; DataError when what is in the file answers another `prompt` (a digest)."""
        if conversation not in self.finished:
            return False
        if self.finished[conversation] not in (prompt, None):  # None: written before digests were
            raise DataError(
                f"{self._path} holds answers to other messages under {conversation}: the data have changed since. Name "
                f"another output, or remove {self._path} to have everything written anew"
            )
        return True

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self._path} cannot be written: {error.strerror or error} (a repeated run goes on from it)")

    def _read(self) -> int:
        """Take in the finished conversations; -> bytes up to the end of the last one."""
        end = complete = 0
        for number, line in enumerate(self._lines(), start=1):
            if not line.endswith(b"\n") and self._torn(line):
                break
            end += len(line)
            try:
                metadata = json.loads(line)["metadata"]
                conversation, last = str(metadata["conversation"]), metadata["part"] == metadata["parts"]
            except (ValueError, LookupError, TypeError):
                raise DataError(
                    f"{self._path}:{number}: not a row of regenerated text, so nothing is appended; name another output"
                ) from None
            self._check(metadata, number)
            if last:
                self.finished[conversation] = metadata.get("prompt")
                complete = end
        return complete

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from file

    @staticmethod
    def _torn(line: bytes) -> bool:
        """The beginning of a row of ours, as a kill leaves it, not a file of somebody else's."""
        try:
            json.loads(line)
        except ValueError:
            return line.startswith(_OPENING[: len(line)])
        return b'"metadata": {' in line

    def _check(self, metadata: Mapping[str, Any], number: int) -> None:
        for name, value in self._identity.items():
            if metadata.get(name) != value:
                raise DataError(
                    f"{self._path}:{number} was generated with {name} = {metadata.get(name)!r}, not {value!r}: "
                    "repeat the earlier settings to continue it, or name another output"
                )
