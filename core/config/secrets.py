"""What must not be shown: values of what is named like a secret, and credentials within addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchspec.core import settings

# "token", not "tokens": eval.max_new_tokens is no secret.
_NAMED = re.compile(r"(?i)(token(?!s)|secret|password|passwd|api[_-]?key|credential)[\w.-]*$")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")
HIDDEN = "***"


def is_secret(name: str) -> bool:
    """Whether something of this name holds a secret, by its last words."""
    return _NAMED.search(name) is not None


def hidden(text: str) -> str:
    """`text` without credentials: those of addresses, and the values of environment variables named like secrets."""
    text = _IN_ADDRESS.sub(f"{HIDDEN}@", text)
    for value in settings.values_named(is_secret):
        text = text.replace(value, HIDDEN)
    return text


def blanked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested JSON with the values of secrets blanked, and texts as `hidden` leaves them."""
    return {
        name: HIDDEN if is_secret(name) and value not in (None, "", {}, []) else _shown(value)
        for name, value in values.items()
    }


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return blanked(value)
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return hidden(value) if isinstance(value, str) else value
