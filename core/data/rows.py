"""Rows of conversation files as typed values, whatever form they were written in.

Forms, in the order in which a row is looked at:

* ``{"input_ids": [...], "loss_mask": [...], "images"?: [...]}``: tokens, used as they are; the images that stand among
  them by the tokens of the target's processor, as paths or data: URIs in their order;
* ``{"messages" | "conversations": [...], "tools"?: [...]}``: OpenAI (``role`` / ``content``) or ShareGPT
  (``from`` / ``value``) messages, told apart message by message;
* ``{"text": "..."}``: already rendered, special tokens included; every token of it is supervised.

``id`` is optional. A row that cannot be used becomes a `BadRow` with a reason; it never stops the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.core.data.messages import Message, RowError, check_text, kind, parse_messages, parse_tools
from torchspec.core.data.readers import Broken, check_files, read_values
from torchspec.core.errors import DataError
from torchspec.core.models.images import ImageError, image_source


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used. `line` counts from 1 (in Parquet: the number of the row)."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation in the form chat templates take: `role`, `content` (text), and what a message may add (`parts`
    where there are images)."""

    sample_id: str
    file: Path
    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None

    @property
    def images(self) -> tuple[str, ...]:
        """Sources of the images of all messages, in order."""
        parts = (part for message in self.messages for part in message.get("parts", ()))
        return tuple(part["source"] for part in parts if part["type"] == "image")


@dataclass(frozen=True, kw_only=True)
class TextRow:
    sample_id: str
    file: Path
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """`loss_mask` has one 0 or 1 per token; `images` are sources, as of a `ChatRow`."""

    sample_id: str
    file: Path
    line: int
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    images: tuple[str, ...] = ()


Row = ChatRow | TextRow | TokenRow


class RowReader:
    """Iterates over the rows of several files; `bytes_read` of `total_bytes` says how far it is."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises DataError for files that are missing, empty, unreadable or of unknown kind, all at once."""
        self.files = tuple(Path(file) for file in files)
        self.total_bytes = check_files(self.files)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Row | BadRow]:
        for file in self.files:
            number = 0
            for number, raw in enumerate(read_values(file, self._advance), start=1):  # noqa: B007
                if isinstance(raw, Broken):
                    yield BadRow(file=file, line=raw.line, reason=raw.reason)
                    continue
                try:
                    yield parse_row(raw.value, file, raw.line)
                except RowError as error:
                    yield BadRow(file=file, line=raw.line, reason=str(error))
            if number == 0:
                raise DataError(f"{file} holds no rows")

    def _advance(self, count: int) -> None:
        self.bytes_read += count


def read_rows(files: Sequence[Path]) -> Iterator[Row | BadRow]:
    """The rows of JSON, JSON Lines and Parquet files, in order, as a stream.

    Raises DataError, before the first row, when a file is missing, empty, unreadable or of unknown kind.
    """
    return iter(RowReader(files))


def parse_row(value: Any, file: Path, line: int) -> Row:
    """One decoded object as a row; RowError says what is wrong with it."""
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object, this is {kind(value)}")
    row = {key: item for key, item in value.items() if item is not None}
    place: dict[str, Any] = {"sample_id": _sample_id(row, file, line), "file": file, "line": line}
    chat_key = next((key for key in ("messages", "conversations") if key in row), None)
    if "input_ids" in row and ("loss_mask" in row or chat_key is None):
        input_ids, loss_mask = _tokens(row)
        images = _images(row.get("images", []), file.parent)
        return TokenRow(**place, input_ids=input_ids, loss_mask=loss_mask, images=images)
    if chat_key is not None:
        messages = parse_messages(row[chat_key], chat_key, file.parent)
        return ChatRow(**place, messages=messages, tools=parse_tools(row.get("tools")))
    if "text" in row:
        return TextRow(**place, text=check_text(row["text"], "text"))
    keys = ", ".join(sorted(map(str, row))) or "none"
    raise RowError(
        f"no conversation in it: needs messages, conversations, text, or input_ids with loss_mask (has {keys})"
    )


def _sample_id(row: dict[str, Any], file: Path, line: int) -> str:
    given = row.get("id")
    if given is None or given == "":
        return f"{file.name}:{line}"
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise RowError(f"id must be a text or a number, this is {kind(given)}")
    return check_text(str(given), "id")


def _tokens(row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if "loss_mask" not in row:
        raise RowError("input_ids without loss_mask: which tokens are to be predicted is not known")
    ids, mask = _integers(row["input_ids"], "input_ids"), _integers(row["loss_mask"], "loss_mask")
    if not ids:
        raise RowError("input_ids is empty")
    if len(ids) != len(mask):
        raise RowError(f"input_ids has {len(ids)} entries, loss_mask {len(mask)}")
    strange = set(mask) - {0, 1}
    if strange:
        raise RowError(f"loss_mask must hold 0 and 1 only, it holds {min(strange)}")
    return ids, mask


def _images(value: Any, directory: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise RowError("images must be a list of paths or data: URIs")
    try:
        return tuple(image_source(check_text(each, "images"), directory) for each in value)
    except ImageError as error:
        raise RowError(str(error)) from error


def _integers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RowError(f"{name} must be a list, it is {kind(value)}")
    wrong = [item for item in value if not isinstance(item, int)]
    if wrong:
        raise RowError(f"{name} must hold integers only, one entry is {kind(wrong[0])}")
    return tuple(int(item) for item in value)
