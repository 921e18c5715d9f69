"""Whether a run fits, as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torchspec.core.pipeline.plan_memory import Need

MB, GB = 10**6, 10**9


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes that together make the run fit, and what a rank would need then."""

    changes: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the rank that needs most needs, of what it may take.

    available    bytes; None where the device cannot say
    advice       what makes it fit where it does not
    least        where nothing does: the changes that come nearest
    """

    need: Need
    available: int | None
    advice: tuple[Advice, ...] = ()
    least: Advice | None = None

    @property
    def fits(self) -> bool:
        return self.available is None or self.need.bytes <= self.available

    def verdict(self) -> str:
        if self.available is None:
            return (
                "nothing says how much memory the device has: train.memory_gb=N checks against N GB, device_gb=N "
                "against what a rank may take of a device of N GB"
            )
        return (
            f"{'fits' if self.fits else 'does not fit'}: {size(self.need.bytes)} of {size(self.available)} for a rank"
        )

    def remedies(self) -> list[str]:
        """A sentence each; none if it fits."""
        found = [f"{' '.join(one.changes)}: then {size(one.bytes)}" for one in self.advice]
        if self.least is not None and self.available is not None:
            over = size(self.least.bytes - self.available)
            changes = " ".join(self.least.changes)
            least = f"the least, {size(self.least.bytes)}, is {changes}" if changes else "nothing makes it smaller"
            found.append(f"no option makes it fit: {least}, {over} too much")
        return found

    def to_json(self) -> dict[str, Any]:
        need = self.need
        return {
            "peak": need.bytes,
            "moment": need.moment,
            "moments": need.moments,
            "parts": [{"name": part.name, "bytes": part.bytes, "how": part.how} for part in need.parts],
            "available": self.available,
            "fits": self.fits,
            "verdict": self.verdict(),
            "advice": [asdict(one) for one in self.advice],
            "least": None if self.least is None else asdict(self.least),
        }

    def lines(self) -> list[str]:
        need = self.need
        parts = sorted(need.parts, key=lambda part: -part.bytes)
        rows = [(part.name, f"{size(part.bytes):>8}", part.how) for part in parts]
        others = ", ".join(f"{name} {size(count)}" for name, count in need.moments.items() if name != need.moment)
        lines = [
            f"memory per rank (estimate): {size(need.bytes)} at the peak of a step, in the moment `{need.moment}`",
            *aligned([*rows, ("sum", f"{size(need.bytes):>8}", "")]),
            f"  the peaks of the other moments: {others}",
            f"  {self.verdict()}",
        ]
        remedies = self.remedies()
        if self.advice:
            lines.append("  what makes it fit, each alone:" if len(remedies) > 1 else "  what makes it fit:")
        return [*lines, *(f"  - {remedy}" for remedy in remedies)]


def size(count: int) -> str:
    """Decimal, as train.memory_gb and train.loss_memory_mb are."""
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / MB:.0f} MB"


def aligned(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Three columns; a long second one stands alone."""
    rows = list(rows)
    first = max((len(row[0]) for row in rows), default=0)
    second = max((len(row[1]) for row in rows if len(row[1]) <= 40), default=0)
    return [f"  {a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows]
