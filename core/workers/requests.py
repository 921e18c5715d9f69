"""Samples to capture, as messages bring them."""

from __future__ import annotations

from typing import Any

from torchspec.core.interfaces.engine import CaptureRequest, Rows
from torchspec.core.workers.protocol import ProtocolError, field, record_id, token_ids


def capture_request(message: Any) -> CaptureRequest:
    """A sample, with the parts of it that callers take where it is shared."""
    name, ids = record_id(message), token_ids(message)
    parts = tuple(_rows(each, len(ids)) for each in (field(message, "parts", list) if "parts" in message else ()))
    part = message.get("part", 0)
    if parts and not (type(part) is int and 0 <= part < len(parts)):
        raise ProtocolError(f"'part' must be one of {len(parts)}, got {part!r}")
    return CaptureRequest(record_id=name, input_ids=ids, parts=parts, part=part)


def _rows(value: Any, tokens: int) -> Rows:
    """Pairs [start, stop) within the sample's tokens."""
    try:
        rows = tuple((start, stop) for start, stop in value)
        fine = bool(rows) and all(type(a) is type(b) is int and 0 <= a < b <= tokens for a, b in rows)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ProtocolError(f"a part must be a list of [start, stop) within {tokens} tokens, got {value!r}")
    return rows
