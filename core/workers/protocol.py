"""What trainer and worker say to each other: JSON over HTTP, version `PROTOCOL`. Described in docs/worker-protocol.md.

No message carries a tensor or anything that would have to be unpickled. Every request bears the worker's token.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import Any

PROTOCOL = 4
TOKEN_VARIABLE = "TORCHSPEC_ENGINE_TOKEN"
MOST_BYTES = 256 << 20
"""Of one message: the token ids of a batch of very long sequences, and the images among them."""

HELLO, CAPTURE, WRITE, COUNTERS, STOP = "/v1/hello", "/v1/capture", "/v1/write", "/v1/counters", "/v1/stop"
USAGE = "/v1/usage"
RECORD, DROP = "/v1/record", "/v1/drop"


class ProtocolError(ValueError):
    """A message that is not what this version of the protocol says."""


def authorised(headers: Mapping[str, str], token: str) -> bool:
    """Compared in constant time."""
    given = headers.get("Authorization", "")
    return hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode())


def field(message: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a message that must be there and of this kind."""
    if not isinstance(message, Mapping):
        raise ProtocolError(f"an object with {name!r} is needed, got {type(message).__name__}")
    value = message.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(f"{name!r} must be {kind}, got {type(value).__name__}")
    return value


def record_id(message: Mapping[str, Any]) -> str:
    """A name that is safe as a part of a file's."""
    name: str = field(message, "id", str)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
        raise ProtocolError("'id' must be up to 100 letters, digits, '-', '_' and '.', and not begin with '.'")
    return name


def token_ids(message: Any, name: str = "input_ids") -> list[int]:
    """A non-empty list of whole numbers."""
    values: list[int] = field(message, name, list)
    if not values or not all(type(value) is int and value >= 0 for value in values):
        raise ProtocolError(f"{name!r} must be a list of token ids, with at least one")
    return values
