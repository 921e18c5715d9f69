"""Which side of a pipeline waits for the other, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from torchspec.core.report.values import listed, mapping, real

Row = Mapping[str, Any]
Points = list[tuple[float, float]]

FIRST_STEPS = 2
"""Of a session: they wait for engines to begin."""
WAITS, HARDLY_WAITS = 0.15, 0.05
IDLE = 0.5


def waited(row: Row) -> float:
    """Seconds of a step in which the trainer waited for texts, and for features."""
    seconds = mapping(row.get("time"))
    return sum(real(seconds.get(name)) or 0.0 for name in ("data", "capture"))


def waiting(rows: Sequence[Row]) -> Points:
    """Fraction of each step in which the trainer waited for features; of runs whose features come from elsewhere."""
    found = [(row["step"], waited(row), real(row.get("step_seconds"))) for row in rows if row.get("pipeline")]
    return [(step, seconds / whole) for step, seconds, whole in found if whole]


def working(rows: Sequence[Row]) -> Points:
    """Fraction of the time in which the engines worked, their mean."""
    found = [
        (
            row["step"],
            [real(mapping(engine).get("busy")) for engine in listed(mapping(row.get("pipeline")).get("engines"))],
        )
        for row in rows
    ]
    told = [(step, [share for share in shares if share is not None]) for step, shares in found]
    return [(step, mean(shares)) for step, shares in told if shares]


def verdict(rows: Sequence[Row]) -> str:
    """In words; "" where nothing flows, or the run was too short to say."""
    waits, works = waiting(rows)[FIRST_STEPS:], working(rows)
    if not waits:
        return ""
    wait = mean(share for _, share in waits)
    told = f"The trainer waited for features {wait:.0%} of the time"
    if not works:
        slow = " Reading them is what bounds the run: a faster disk would help, or more memory for its cache."
        return f"{told}.{slow if wait > WAITS else ''}"
    work = mean(share for _, share in works)
    told += f", the engines worked {work:.0%} of it."
    if wait > WAITS and work > 1 - IDLE:
        return f"{told} The engines bound the run: more of them (pipeline.engines) would make it faster."
    if wait > WAITS:
        return (
            f"{told} Both wait: features do not come fast enough from one to the other. Let more be asked for ahead "
            "(pipeline.prefetch_mb, engine.store_mb), or look at the way between them (pipeline.store)."
        )
    if wait < HARDLY_WAITS and work < IDLE:
        return f"{told} The trainer bounds the run: fewer engines would do, or more ranks would make it faster."
    return f"{told} Both sides are about as fast."
