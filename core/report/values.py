"""What a run's files hold, taken as what it should be: they may be damaged, of another program, or made to deceive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
LARGEST = 1e300
"""Beyond it a number cannot be drawn."""


def real(value: object) -> float | None:
    """A finite number; None for anything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None  # false for NaN, too


def mapping(value: object) -> Mapping[str, Any]:
    """An object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def listed(value: object) -> list[Any]:
    """A list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def number(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < LARGEST else "a number beyond all measure"
    return f"[{', '.join(map(number, value))}]" if isinstance(value, list) else str(value)
