"""Draws the figures of the documentation: `python ci/drawings.py docs/images`; a test keeps them current.

What is drawn is asked of the code where it can be: who owns which rows of `Layout`, who sees whom of the masks. Each
figure has a light ground of its own, so that it can be read on a dark page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import torch

from torchspec.core.attention.block import BlockMask
from torchspec.core.parallel.shards import Layout

GROUND, INK, PALE, LINE = "#fcfcfa", "#20242c", "#6b7280", "#c9cdd4"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#4c8bc9", "#e9a13b", "#4fa67f", "#a57fc4", "#e3e5e9"
RANKS = (BLUE, ORANGE, GREEN, PURPLE)
CELL = 20

Holder = Callable[[int, int], int]
"""The rank that holds a head of a token."""


class Drawing:
    """Shapes in pixels, from the upper left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13">\n<title>{escape(title)}</title>\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{width}" height="{height}" rx="6" fill="{GROUND}"/>\n'
        )
        self._parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", rx: int = 0) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{rx}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: int = 13, fill: str = INK, at: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{at}"{weight}>'
            f"{escape(words)}</text>"
        )

    def arrow(self, *points: tuple[float, float], both: bool = False) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        start = ' marker-start="url(#tip)"' if both else ""
        self._parts.append(
            f'<path d="M{path}" fill="none" stroke="{INK}" stroke-width="1.4"{start} marker-end="url(#tip)"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, lines: Sequence[str], fill: str) -> None:
        """The first line is its name."""
        self.rect(x, y, w, h, fill, INK, 5)
        for number, words in enumerate(lines):
            self.text(x + w / 2, y + 20 + 17 * number, words, size=12 if number else 13, at="middle", bold=not number)

    def __str__(self) -> str:
        return self._head + "\n".join(self._parts) + "\n</svg>\n"


def cells(drawing: Drawing, x: float, y: float, colour: Callable[[int, int], str], rows: int, columns: int) -> None:
    """A grid; `colour(row, column)` fills a cell."""
    for row in range(rows):
        for column in range(columns):
            drawing.rect(x + column * CELL, y + row * CELL, CELL - 1, CELL - 1, colour(row, column))


def ttt_mask(slots: int = 6, steps: int = 3) -> Drawing:
    """Queries down, keys across, step by step."""
    pad, top, gap = 92, 76, 14
    side = slots * CELL
    extent = steps * side + (steps - 1) * gap
    drawing = Drawing(pad + extent + 20, top + extent + 62, "Attention of the EAGLE-3 unroll: who sees which keys")
    drawing.text(pad, 26, "keys", bold=True)
    drawing.text(16, top - 12, "queries", bold=True)
    for step in range(steps):
        at = step * (side + gap)
        drawing.text(pad + at + side / 2, 48, f"step {step}", at="middle")
        drawing.text(16, top + at + side / 2 + 4, f"step {step}")
        for slot in range(slots):
            middle = at + slot * CELL + CELL / 2
            drawing.text(pad + middle - 0.5, 66, str(slot), size=10, fill=PALE, at="middle")
            drawing.text(pad - 8, top + middle + 3, str(slot), size=10, fill=PALE, at="end")
        for key_step in range(steps):
            seen, first = sees(step, key_step), key_step == 0
            cells(
                drawing,
                pad + key_step * (side + gap),
                top + at,
                lambda i, j, seen=seen, first=first: (BLUE if first else ORANGE) if seen(i, j) else GREY,  # type: ignore[misc]
                slots,
                slots,
            )
    foot = top + extent + 24
    drawing.rect(pad, foot - 11, 14, 14, BLUE)
    drawing.text(pad + 20, foot, "keys of step 0, up to the slot: flash attention, one call")
    drawing.rect(pad, foot + 11, 14, 14, ORANGE)
    drawing.text(pad + 20, foot + 22, "the slot's own keys of steps 1 to k: one diagonal each")
    return drawing


def sees(step: int, key_step: int) -> Callable[[int, int], bool]:
    """Whether slot i at `step` sees the key that slot j wrote at `key_step` (docs/concepts.md)."""
    if key_step == 0:
        return lambda i, j: j <= i
    return lambda i, j: i == j and key_step <= step


def block_mask(length: int = 12, size: int = 4, anchors: tuple[int, ...] = (3, 5, 9)) -> Drawing:
    """Slots of three blocks down; the context and the blocks' own slots across."""
    limits = BlockMask(size=size).context(torch.tensor([anchors]), torch.zeros(1, len(anchors), dtype=torch.long))
    context = limits.to_dense(len(anchors) * size, length, torch.device("cpu"))[0].tolist()
    pad, top, gap = 150, 74, 14
    wide, rows = length * CELL, len(anchors) * size
    drawing = Drawing(
        pad + wide + gap + rows * CELL + 20, top + rows * CELL + 2 * gap + 62, "Attention of a draft of blocks"
    )
    drawing.text(16, top - 12, "queries", bold=True)
    drawing.text(pad, 26, "keys", bold=True)
    drawing.text(pad + wide / 2, 46, "the context, by position", at="middle")
    drawing.text(pad + wide + gap + rows * CELL / 2, 46, "slots of the blocks", at="middle")
    for position in range(length):
        drawing.text(pad + position * CELL + CELL / 2, 66, str(position), size=10, fill=PALE, at="middle")
    for block, anchor in enumerate(anchors):
        y, first = top + block * (size * CELL + gap), block * size
        drawing.text(16, y + size * CELL / 2 - 3, f"block {block}")
        drawing.text(16, y + size * CELL / 2 + 13, f"anchor {anchor}", size=11, fill=PALE)
        for slot in range(size):
            drawing.text(pad - 8, y + slot * CELL + 14, "known" if slot == 0 else "mask", size=10, fill=PALE, at="end")
            drawing.text(
                pad + wide + gap + (first + slot) * CELL + CELL / 2, 66, str(slot), size=10, fill=PALE, at="middle"
            )
        cells(
            drawing,
            pad,
            y,
            lambda i, j, first=first: BLUE if context[first + i][j] else GREY,  # type: ignore[misc]
            size,
            length,
        )
        cells(
            drawing,
            pad + wide + gap,
            y,
            lambda i, j, block=block: ORANGE if j // size == block else GREY,  # type: ignore[misc]
            size,
            rows,
        )
    foot = top + rows * CELL + 2 * gap + 24
    drawing.rect(pad, foot - 11, 14, 14, BLUE)
    drawing.text(pad + 20, foot, "taps of everything before the anchor")
    drawing.rect(pad, foot + 11, 14, 14, ORANGE)
    drawing.text(pad + 20, foot + 22, "every slot of the same block, and of no other")
    return drawing


def usp(length: int = 16, ulysses: int = 2, ring: int = 2, heads: int = 4) -> Drawing:
    """Which rank holds which (head, token) at rest, after the Ulysses exchange, and what goes round the ring."""
    layout = Layout(length=length, ulysses=ulysses, ring=ring)
    owner = {position: rank for rank in range(layout.ranks) for position in layout.positions(rank).tolist()}
    pad, wide, tall = 108, length * CELL, heads * CELL
    drawing = Drawing(pad + wide + 330, 3 * (tall + 74) + 66, "A sequence shared by 2 x 2 ranks: Ulysses and ring")
    by_heads: Holder = lambda head, token: owner[token] // ulysses * ulysses + head * ulysses // heads  # noqa: E731
    panels: tuple[tuple[str, Holder, tuple[str, ...]], ...] = (
        (
            "1  at rest",
            lambda head, token: owner[token],
            ("Each rank owns an early and an equally", "late piece of the rows, with all heads."),
        ),
        (
            "2  after the Ulysses exchange",
            by_heads,
            (
                "Ranks 0 and 1 (and 2 and 3) have changed",
                "rows for heads: all rows that the two own,",
                "half of the heads.",
            ),
        ),
        (
            "3  the ring",
            by_heads,
            (
                "Queries stay. Keys and values go round",
                "between ranks of the same heads, 0 and 2",
                "(and 1 and 3), while the block at hand is",
                "worked on; parts merge by log-sum-exp.",
            ),
        ),
    )
    for number, (name, held, words) in enumerate(panels):
        y = 50 + number * (tall + 74)
        drawing.text(16, y - 22, name, bold=True)
        for token in range(length):
            drawing.text(pad + token * CELL + CELL / 2, y - 5, str(token), size=10, fill=PALE, at="middle")
        for head in range(heads):
            drawing.text(pad - 8, y + head * CELL + 14, f"head {head}", size=10, fill=PALE, at="end")
        cells(drawing, pad, y, lambda head, token, held=held: RANKS[held(head, token)], heads, length)  # type: ignore[misc]
        for line, text in enumerate(words):
            drawing.text(pad + wide + 22, y + 12 + 18 * line, text)
    y = 50 + 2 * (tall + 74) + tall + 12
    for segment in (layout.segments(0)[0], layout.segments(0)[-1]):
        inside = pad + (segment.start + segment.stop) / 2 * CELL
        towards = pad + length * CELL / 2 + (-1 if segment.start == 0 else 1) * 2 * CELL
        drawing.arrow((inside, y - 8), (inside, y + 8), (towards, y + 8), (towards, y - 6), both=True)
    for rank, colour in enumerate(RANKS):
        x = pad + rank * 84
        drawing.rect(x, y + 32, 14, 14, colour)
        drawing.text(x + 20, y + 44, f"rank {rank}")
    return drawing


def pipelines() -> Drawing:
    """Who holds what, and what streams."""
    drawing = Drawing(860, 640, "Where the target runs: in the trainer's process, beside it, on a cluster")
    engine, trainer, store = "#dbe8f5", "#e0f1e8", "#fbecd3"
    drawing.text(20, 30, "inprocess", size=15, bold=True)
    drawing.rect(20, 42, 820, 116, "#ffffff", LINE, 6)
    drawing.text(32, 62, "one process on each device", size=12, fill=PALE)
    drawing.box(60, 76, 210, 64, ("target", "all layers (hf)", "forward only"), engine)
    drawing.box(590, 76, 210, 64, ("trainer", "draft, optimizer", "target's embedding, norm, head"), trainer)
    drawing.arrow((270, 108), (590, 108))
    drawing.text(430, 100, "taps, last hidden states, tokens", at="middle")
    drawing.text(430, 126, "a function call", size=12, fill=PALE, at="middle")

    drawing.text(20, 196, "colocated", size=15, bold=True)
    drawing.rect(20, 208, 820, 152, "#ffffff", LINE, 6)
    drawing.text(32, 228, "processes that share each device, a part of its memory each", size=12, fill=PALE)
    drawing.box(
        60,
        244,
        210,
        98,
        ("engine's worker", "hf, vllm or sglang", "all layers, split over devices", "works ahead of the steps"),
        engine,
    )
    drawing.box(
        590,
        244,
        210,
        98,
        ("rank", "draft, optimizer: its shard", "target's embedding, norm, head", "asks for what it will need"),
        trainer,
    )
    drawing.box(345, 258, 170, 70, ("features", "buffers on the device,", "or shared memory"), store)
    drawing.arrow((270, 284), (345, 284))
    drawing.arrow((515, 284), (590, 284))
    drawing.arrow((590, 336), (270, 336))
    drawing.text(430, 352, "token ids; no tensors", size=12, fill=PALE, at="middle")

    drawing.text(20, 398, "disaggregated", size=15, bold=True)
    drawing.rect(20, 410, 820, 210, "#ffffff", LINE, 6)
    drawing.box(345, 422, 170, 64, ("driver (Ray)", "places, watches, restarts", "no data pass through it"), "#eeeef2")
    drawing.box(
        60, 502, 210, 98, ("engines' workers", "as many as you like", "each on its own devices", "any node"), engine
    )
    drawing.box(
        590, 502, 210, 98, ("ranks", "as many as you like", "draft and optimizer: sharded", "any node"), trainer
    )
    drawing.box(345, 508, 170, 70, ("features", "Mooncake, or the", "workers' own protocol"), store)
    drawing.arrow((345, 454), (165, 454), (165, 502))
    drawing.arrow((515, 454), (695, 454), (695, 502))
    drawing.arrow((270, 536), (345, 536))
    drawing.arrow((515, 536), (590, 536))
    drawing.arrow((590, 592), (270, 592))
    drawing.text(430, 608, "token ids; no tensors", size=12, fill=PALE, at="middle")
    return drawing  # fmt: skip


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "ttt-mask.svg": ttt_mask,
    "block-mask.svg": block_mask,
    "usp.svg": usp,
    "pipelines.svg": pipelines,
}


def main() -> int:
    folder = Path(sys.argv[1])
    for name, draw in DRAWINGS.items():
        (folder / name).write_text(str(draw()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
