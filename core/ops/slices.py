"""Slices of rows that a cache holds: elementwise passes one after the other are then several times faster."""

from __future__ import annotations

from collections.abc import Iterator


def row_slices(first: int, last: int, row_bytes: int, temporary_bytes: int) -> Iterator[slice]:
    """[first, last) in slices of about `temporary_bytes`, one row at least."""
    step = max(1, temporary_bytes // max(1, row_bytes))
    return (slice(start, min(start + step, last)) for start in range(first, last, step))
