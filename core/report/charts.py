"""Curves as inline SVG, or as PNG for files; one function per kind of chart. What stands along x is counted."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 6.4, 2.9
COLOURS = ("#2f6feb", "#d1592b", "#2da36c", "#8a5bd6", "#b8860b", "#c2397f", "#4a90a4", "#7a7a7a")
Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, x: str, y: str, smooth: bool = False) -> str:
    """One line per named series of (x, y); `smooth` draws a running mean over the raw points."""
    return _svg(_lines(series, x=x, y=y, smooth=smooth))


def lines_png(series: Mapping[str, Points], *, x: str, y: str) -> bytes:
    """As `lines`."""
    return _png(_lines(series, x=x, y=y, smooth=False))


def _lines(series: Mapping[str, Points], *, x: str, y: str, smooth: bool) -> Figure:
    figure, axes = _figure(x, y)
    for colour, (name, points) in zip(cycle(COLOURS), series.items(), strict=False):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        if smooth and len(ys) > 20:
            axes.plot(xs, ys, color=colour, alpha=0.22, linewidth=0.8)
            ys = _running_mean(ys, max(5, len(ys) // 40))
        marker = "o" if len(xs) <= 12 else None
        axes.plot(xs, ys, color=colour, linewidth=1.6, label=name, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=min(4, len(series)))
    drawn: Figure = figure
    return drawn


def pairs_png(values: Mapping[str, tuple[float, float]], *, names: tuple[str, str], x: str) -> bytes:
    """Two labelled bars side by side per name."""
    figure, axes = _figure(x, "")
    places = range(len(values))
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        heights = [pair[number] for pair in values.values()]
        drawn = axes.bar(
            [place + 0.4 * number - 0.2 for place in places], heights, width=0.38, color=colour, label=name
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(list(places), list(values), rotation=20, ha="right")
    axes.set_ylim(0, 1.2 * max([height for pair in values.values() for height in pair], default=1.0))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _png(figure)


def bars(values: Mapping[str, float], *, x: str, y: str, top: float | None = None) -> str:
    """One labelled bar per name."""
    figure, axes = _figure(x, y)
    drawn = axes.bar(list(values), list(values.values()), color=COLOURS[0], width=0.6)
    axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.set_ylim(0, top if top is not None else 1.15 * max([*values.values(), 1e-9]))
    return _svg(figure)


def _figure(x: str, y: str):  # type: ignore[no-untyped-def]  # matplotlib's axes are untyped here
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    return figure, axes


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    out: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        out.append(total / min(index + 1, window))
    return out


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
