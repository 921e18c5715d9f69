"""A drawing, its table and its words say the same, and colours can be told apart by everybody."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from torchspec.core.report import charts
from torchspec.core.report.charts import Chart, Points, View

Colour = tuple[float, float, float]

SERIES = {
    "loss": [(float(step), 9 / step + 0.1 * (step % 3)) for step in range(1, 40)],
    "decoded": [(10.0, 2.5), (39.0, 7.25)],
}


def drawn_lines(view: View) -> list[list[tuple[float, float]]]:
    """Places on the paper of each line's points; y grows upwards."""
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none;[^"]*stroke: var\(--c\d\)', view.svg)
    return [[(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def listed(view: View) -> list[list[tuple[float, float]]]:
    """The table's columns as points."""
    return [
        [(float(row[0]), float(row[place])) for row in view.table.rows if row[place]]
        for place in range(1, len(view.table.heads))
    ]


def assert_same_but_for_scale(drawn: Points, told: Points) -> None:
    """Each axis of the paper is a stretched and shifted axis of the figures."""
    assert len(drawn) == len(told)
    for axis in (0, 1):
        on_paper, figures = (np.array([point[axis] for point in points]) for points in (drawn, told))
        low, high = figures.argmin(), figures.argmax()
        scale = (on_paper[high] - on_paper[low]) / (figures[high] - figures[low])
        assert scale > 0
        np.testing.assert_allclose(on_paper, on_paper[low] + scale * (figures - figures[low]), atol=2e-3)


def test_a_table_holds_what_is_drawn() -> None:
    over = {"step": SERIES, "tokens": {name: [(512 * x, y) for x, y in points] for name, points in SERIES.items()}}
    chart = charts.lines("Loss", over, y="nats", source="metrics.jsonl")
    assert [view.over for view in chart.views] == ["step", "tokens"]
    for view, series in zip(chart.views, over.values(), strict=True):
        assert view.table.heads == (view.over, "loss", "decoded")
        drawn, told = drawn_lines(view), listed(view)
        assert_same_but_for_scale([p for line in drawn for p in line], [p for line in told for p in line])
        for line, points in zip(told, series.values(), strict=True):
            np.testing.assert_allclose(line, points, rtol=1e-5)


def test_a_smoothed_line_is_the_running_mean_over_the_points_of_the_table() -> None:
    (view,) = charts.lines("Loss", {"step": {"loss": SERIES["loss"]}}, y="", smooth=True).views
    raw, mean = drawn_lines(view)
    values = [value for _, value in listed(view)[0]]
    means = [np.mean(values[max(0, place - 4) : place + 1]) for place in range(len(values))]
    steps = [step for step, _ in listed(view)[0]]
    told = [*zip(steps, values, strict=True), *zip(steps, means, strict=True)]
    assert_same_but_for_scale([*raw, *mean], told)


def test_bars_are_as_high_as_their_table_says() -> None:
    values = {"data": 0.125, "capture": 0.5, "forward": 0.25}
    (view,) = charts.bars("Time", values, x="phase", y="share", top=1.0).views
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: var\(--c0\)', view.svg)
    heights = [np.ptp([float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path)]) for path in paths]
    told = [float(row[1]) for row in view.table.rows]
    assert [row[0] for row in view.table.rows] == list(values)
    np.testing.assert_allclose(np.array(heights) / heights[1], np.array(told) / told[1], rtol=1e-4)
    assert "capture 0.5" in view.alt


def test_what_is_too_much_to_show_is_thinned_with_its_ends_kept_and_said() -> None:
    many = [(float(step), float(step % 7)) for step in range(5000)]
    series = {f"position {place}": many for place in range(30)}
    chart = charts.lines("Many", {"step": series}, y="", source="metrics.jsonl")
    (view,) = chart.views
    assert chart.note == "The first 24; 6 more are in metrics.jsonl."
    assert len(chart.keys) == 24
    assert len(drawn_lines(view)) == 24
    assert len(view.table.rows) == 60
    assert (view.table.rows[0][0], view.table.rows[-1][0]) == ("0", "4999")
    assert view.table.note == "60 of 1,001 rows. All figures are in metrics.jsonl."
    assert len(view.svg) < 2_000_000


@pytest.mark.parametrize("name", ["x" * 300, "a_{$\\frac", "<b>&amp;", "名前" * 40, "a\nb"])
def test_names_of_any_kind_are_drawn_as_they_are_and_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar = charts.bars("Time", dict.fromkeys([name, *"abcdefgh"], 0.5), x="", y="")
        line = charts.lines("Loss", {"step": {name: SERIES["loss"], "b": SERIES["loss"]}}, y="")
    assert bar.views[0].table.rows[0][0] == name
    assert line.keys[0].name == name
    assert "<b>" not in bar.views[0].svg


def test_a_page_is_the_same_each_time_it_is_drawn() -> None:
    first, second = (charts.lines("Loss", {"step": SERIES}, y="") for _ in range(2))
    assert first == second


def themes() -> dict[str, dict[str, str]]:
    """The custom properties of style.html, by theme."""
    text = resources.files("torchspec.core.report").joinpath("style.html").read_text()
    light, dark = (dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", part)) for part in text.split("@media", 2)[:2])
    return {"light": light, "dark": light | dark}


def linear(colour: str) -> Colour:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return r, g, b


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""
    low, high = sorted(float(np.dot((0.2126, 0.7152, 0.0722), linear(each))) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


SEEN = {
    "all": np.eye(3),
    # Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz @ np.clip(rgb, 0, 1)) / np.array([0.9505, 1.0, 1.089])
    f = [each ** (1 / 3) if each > 0.008856 else 7.787 * each + 16 / 116 for each in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stand_out_from_the_page_and_from_each_other(theme: str) -> None:
    known = themes()[theme]
    lines = [known[f"--c{place}"] for place in range(len(charts.COLOURS))]
    for colour in lines:
        assert contrast(colour, known["--card"]) >= 3, colour  # WCAG 1.4.11, graphical objects
    for name in ("--ink", "--soft", "--alarm"):
        assert contrast(known[name], known["--card"]) >= 4.5, name  # WCAG 1.4.3, text
    texts = {**dict.fromkeys(("d1", "d2", "d3"), "--ink"), "d4": "--t4", "d5": "--t5"}
    for mark, text in texts.items():
        assert contrast(known[f"--{mark}"], known[text]) >= 4.5, mark
    marks = [lab(np.array(linear(known[f"--{mark}"])))[0] for mark in texts]
    steps = np.diff(marks)
    assert (np.abs(steps) >= 5).all()
    assert len({float(step) for step in np.sign(steps)}) == 1, "a ramp of lightness"
    for how, matrix in SEEN.items():
        for (i, one), (j, other) in itertools.combinations(enumerate(lines), 2):
            apart = np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other)))
            assert apart >= 8 or dashes(i) != dashes(j), (how, one, other)


def dashes(place: int) -> str:
    chart: Chart = charts.lines("x", {"step": {str(n): [(0.0, 1.0)] for n in range(24)}}, y="")
    return chart.keys[place].dashes


def test_no_two_lines_of_a_chart_look_alike() -> None:
    chart = charts.lines("x", {"step": {str(n): [(0.0, 1.0)] for n in range(24)}}, y="")
    looks = [(key.colour, key.dashes) for key in chart.keys]
    assert len(set(looks)) == 24
    assert all(one[1] != other[1] for one, other in itertools.pairwise(looks[:6]))
    light = themes()["light"]
    assert [light[f"--c{place}"] for place in range(len(charts.COLOURS))] == list(charts.COLOURS)


def test_files_have_the_colours_of_the_light_theme() -> None:
    """What the names of an SVG stand for would be seen as it is in a file: a grid of nearly black lines, once."""
    light = themes()["light"]
    pairs = charts.pairs_png({"a": (2.0, 1.0)}, names=("height", "width"), x="")
    with Image.open(io.BytesIO(pairs)) as image:
        pixels = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert {light[name] for name in ("--line", "--c0", "--c1")} <= {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pixels}
    view = charts.bars("Time", {"a": 1.0}, x="", y="").views[0]
    assert not re.findall(r": (#[0-9a-f]{6})", view.svg), "a page has names alone"
    assert {"var(--line)", "var(--ink)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", view.svg))
