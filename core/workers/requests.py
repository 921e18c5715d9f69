"""Samples to capture and texts to write, as messages bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec.core.interfaces.engine import CaptureRequest, DraftSource, ImageReference, Images, Rows
from torchspec.core.workers.protocol import ProtocolError, field, record_id, token_ids
from torchspec.core.workers.runner import Ask


def capture_request(message: Any) -> CaptureRequest:
    """A sample, with the parts of it that callers take where it is shared."""
    name, ids = record_id(message), token_ids(message)
    parts = tuple(_rows(each, len(ids)) for each in (field(message, "parts", list) if "parts" in message else ()))
    part = message.get("part", 0)
    if parts and not (type(part) is int and 0 <= part < len(parts)):
        raise ProtocolError(f"'part' must be one of {len(parts)}, got {part!r}")
    return CaptureRequest(record_id=name, input_ids=ids, parts=parts, part=part, images=_images(message))


def asks_of(message: Any) -> list[Ask]:
    """Of a request for text."""
    stop, source = field(message, "stop", list), None
    if "source" in message:
        given = field(message, "source", dict)
        source = DraftSource(directory=Path(field(given, "directory", str)), length=field(given, "length", int))
        if source.length < 1:
            raise ProtocolError(f"a source drafts at least 1 token, got {source.length}")
    return [
        Ask(
            input_ids=token_ids(each),
            max_new_tokens=field(message, "max_new_tokens", int),
            temperature=float(field(message, "temperature", (int, float))),
            seed=field(each, "seed", int),
            stop=stop,
            common_seed=field(message, "seed", int) if "seed" in message else 0,
            source=source,
            images=_images(each),
        )
        for each in field(message, "prompts", list)
    ]


def _images(message: Any) -> Images:
    """Images come with the message: no worker opens a path that it is told."""
    given = field(message, "images", list) if "images" in message else []
    images = tuple(
        ImageReference(source=field(each, "source", str), digest=field(each, "digest", str)) for each in given
    )
    if not all(image.source.startswith("data:") for image in images):
        raise ProtocolError("the 'source' of an image must be a data: URI with its bytes")
    return images


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
