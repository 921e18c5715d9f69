"""Charts: a drawing as inline SVG, the same figures as a table, and in words; or a PNG for files.

Colours are those of style.html, so that a drawing follows the page's theme; no two lines differ by colour alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from torchspec.core.report.values import number

WIDTH, HEIGHT = 4.8, 2.5
PNG_SIZE = (6.4, 2.9)
COLOURS = ("#0072b2", "#c8500a", "#007f5f", "#a8508a", "#806600", "#333a45")
"""Of files; style.html has them as `--c0` and on, and others for the dark theme."""
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 1.5), (1.2, 1.2), (5.0, 1.5, 1.2, 1.5))
DRAWN, MOST_LINES, MOST_BARS = 1001, 24, 16
LISTED = 60
"""Rows of a table."""
LONGEST_NAME = 22
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Table:
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """A drawing over one axis (`over`: "" where there is no other). `alt` is what it shows in words."""

    over: str
    svg: str
    alt: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class Key:
    """A line of a legend: `colour` a name of style.html, `dashes` an SVG stroke-dasharray."""

    name: str
    colour: str
    dashes: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    views: tuple[View, ...]
    keys: tuple[Key, ...] = ()
    note: str = ""


def lines(
    title: str,
    over: Mapping[str, Mapping[str, Points]],
    *,
    y: str,
    note: str = "",
    smooth: bool = False,
    source: str = "",
    named: bool = False,
) -> Chart:
    """One line per named series of (x, y) over each axis, by the axis' name; `smooth` draws a running mean over the raw
    points. `source` says in the tables where all figures are; `named`: a single line has a legend, too."""
    views, names = [], list(next(iter(over.values())))[:MOST_LINES]
    for x, series in over.items():
        drawn = {name: _thinned(sorted(series[name]), DRAWN) for name in names}
        svg = _svg(partial(_lines, drawn, x=x, y=y, smooth=smooth), f"{title} {x}")
        table = _table(x, drawn, source)
        views.append(View(over=x, svg=svg, alt=_in_words(title, x, drawn), table=table))
    keys = [Key(name=name, colour=f"--c{_style(i)[0]}", dashes=_stroke(_style(i)[1])) for i, name in enumerate(names)]
    left_out = len(next(iter(over.values()))) - len(names)
    note += f" The first {MOST_LINES}; {left_out} more are in {source}." if left_out else ""
    shown = tuple(keys) if named or len(keys) > 1 else ()
    return Chart(title=title, note=note.strip(), views=tuple(views), keys=shown)


def bars(title: str, values: Mapping[str, float], *, x: str, y: str, note: str = "", top: float | None = None) -> Chart:
    """One labelled bar per name; of very many the first."""
    shown = dict(list(values.items())[:MOST_BARS])
    note += f" The first {len(shown)} of {len(values)}." if len(shown) < len(values) else ""
    alt = f"{title}: {', '.join(f'{name} {number(value)}' for name, value in shown.items())}."
    table = Table(heads=(x, y), rows=tuple((name, f"{value:.6g}") for name, value in shown.items()))
    view = View(over="", svg=_svg(partial(_bars, shown, x=x, y=y, top=top), title), alt=alt, table=table)
    return Chart(title=title, note=note.strip(), views=(view,))


def lines_png(series: Mapping[str, Points], *, x: str, y: str) -> bytes:
    """As `lines`, with a legend."""
    figure = _lines(series, x=x, y=y, smooth=False, size=PNG_SIZE)
    if len(series) > 1:
        figure.axes[0].legend(frameon=False, fontsize=8, ncols=min(4, len(series)), handlelength=3)  # room for dashes
    return _png(figure)


def pairs_png(values: Mapping[str, tuple[float, float]], *, names: tuple[str, str], x: str) -> bytes:
    """Two labelled bars side by side per name."""
    figure, axes = _figure(x, "", PNG_SIZE)
    places = range(len(values))
    for which, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        heights = [pair[which] for pair in values.values()]
        drawn = axes.bar([place + 0.4 * which - 0.2 for place in places], heights, width=0.38, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(list(places), list(values), rotation=20, ha="right")
    axes.set_ylim(0, 1.2 * max([height for pair in values.values() for height in pair], default=1.0))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _png(figure)


def shortened(name: str) -> str:
    """A name that fits beside a drawing, its beginning and its end."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"


def _lines(series: Mapping[str, Points], *, x: str, y: str, smooth: bool, size: tuple[float, float]) -> Figure:
    figure, axes = _figure(x, y, size)
    for place, (name, points) in enumerate(series.items()):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        colour, dashes = COLOURS[_style(place)[0]], _style(place)[1]
        if smooth and len(ys) > 20:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
            ys = _running_mean(ys, max(5, len(ys) // 40))
        style: Any = (0, dashes) if dashes else "solid"
        marker = "o" if len(xs) <= 12 else None
        axes.plot(xs, ys, color=colour, linewidth=1.6, linestyle=style, label=name, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if max((point[0] for points in series.values() for point in points), default=0) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _bars(values: Mapping[str, float], *, x: str, y: str, top: float | None, size: tuple[float, float]) -> Figure:
    figure, axes = _figure(x, y, size)
    drawn = axes.bar(range(len(values)), list(values.values()), color=COLOURS[0], width=0.6)
    axes.set_xticks(range(len(values)), [shortened(name) for name in values])
    if sum(len(shortened(name)) + 2 for name in values) > 60:
        axes.tick_params(axis="x", rotation=30)
    axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2, color=_INK)
    axes.set_ylim(0, top if top is not None else 1.15 * max([*values.values(), 1e-9]))
    return figure


def _figure(x: str, y: str, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.add_subplot()  # matplotlib's axes are untyped here
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, color=_SOFT, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_SOFT)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _style(place: int) -> tuple[int, tuple[float, ...]]:
    """Number of a colour, and dashes: 24 pairs, neighbours and lines of one colour differ in dashes, too."""
    return place % len(COLOURS), DASHES[(place + place // len(COLOURS)) % len(DASHES)]


def _stroke(dashes: Sequence[float]) -> str:
    return " ".join(f"{1.6 * length:g}" for length in dashes)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    out: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        out.append(total / min(index + 1, window))
    return out


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def _table(x: str, series: Mapping[str, Points], source: str) -> Table:
    by_name = {name: dict(points) for name, points in series.items()}
    places = sorted({place for points in by_name.values() for place in points})
    shown = _thinned(places, LISTED)
    note = f"{len(shown)} of {len(places):,} rows." if len(shown) < len(places) else ""
    rows = [
        (f"{place:.10g}", *(f"{points[place]:.6g}" if place in points else "" for points in by_name.values()))
        for place in shown
    ]
    told = f"{note} {f'All figures are in {source}.' if source else ''}"
    return Table(heads=(x, *by_name), rows=tuple(rows), note=told.strip())


def _in_words(title: str, x: str, series: Mapping[str, Points]) -> str:
    told = []
    for name, points in series.items():
        (first_x, first), (last_x, last) = points[0], points[-1]
        values = [value for _, value in points]
        spread = f", between {number(min(values))} and {number(max(values))}" if len(points) > 2 else ""
        way = f"{number(first)} at {first_x:.10g}"
        told.append(f"{name} {way}" + (f", {number(last)} at {last_x:.10g}{spread}" if len(points) > 1 else ""))
    return f"{title} over {x}. {'; '.join(told)}."


# Of files; in an SVG these, too, stand for what style.html makes of them.
_INK, _SOFT, _GRID = "#1c2330", "#566170", "#d9dee6"
_NAMED = {_INK: "--ink", _SOFT: "--soft", _GRID: "--line", **{colour: f"--c{i}" for i, colour in enumerate(COLOURS)}}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_IDS = re.compile(r' id="(?:figure|axes|patch|line2d|matplotlib\.axis|xtick|ytick|text|legend)_\d+"')


def _svg(draw: Callable[..., Figure], salt: str) -> str:
    """Text as text, names of the page's colours, and no ids that two drawings would share."""
    buffer = io.StringIO()
    plain = mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": salt})
    with plain, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser draws the text
        draw(size=(WIDTH, HEIGHT)).savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    text = _IDS.sub("", buffer.getvalue())
    for colour, name in _NAMED.items():
        text = text.replace(f": {colour}", f": var({name})")
    return text[text.index("<svg") :]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
