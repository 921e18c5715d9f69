"""The pages in a real browser, as people see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchspec.core.report.compare import write_comparison
from torchspec.core.report.html import write_report

HOSTILE = "<img src=x onerror=hit()><script>hit()</script>$\\alpha_{"
LONG = "a-run-of-which-the-name-goes-on-and-on" * 4
NARROW, WIDE = 360, 1200


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(
    request: pytest.FixtureRequest, write_run: Any, make_files: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of runs with names that are long or made to deceive, of which one failed with a long message."""
    files, place = make_files(), tmp_path_factory.mktemp("seen")
    files["environment.json"]["sessions"][0]["ended"] |= {"how": "failed", "cause": HOSTILE + "x" * 600}
    files["eval.json"]["samples"][0] |= {"id": HOSTILE, "prompt": HOSTILE, "pieces": [[HOSTILE, 1], ["y" * 900, 2]]}
    files["config.yaml"] |= {"target": {"path": HOSTILE}, "name": "z" * 900}
    files["metrics.jsonl"] += [{"kind": "served", "step": 3, "engine": HOSTILE, "acceptance_length": 1.0}]
    files["metrics.jsonl"][0]["time"][HOSTILE] = 1.0
    first = write_run(place / LONG, files)
    if request.param == "report":
        return write_report(first)
    others = [write_run(place / name, files) for name in ("<b>$x_{", "c", "d")]
    return write_comparison([first, *others])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_a_page_is_whole_quiet_and_no_wider_than_its_window(browser: Any, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    beyond = (
        "[...document.querySelectorAll('section, .tile, h1')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.value(f"{beyond}.length") == 0
    assert browser.value("document.querySelectorAll('figure svg').length") >= 6
    assert browser.value("document.querySelectorAll('script, img, link, iframe').length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(", "))) < 200) == dark


def test_one_axis_is_shown_at_a_time(browser: Any, page: Path) -> None:
    browser.open(page, width=WIDE)
    shown = "[1, 2].map(n => [...document.querySelectorAll('.over-' + n)].filter(e => e.offsetParent !== null).length)"
    steps, tokens = browser.value(shown)
    assert steps >= 3
    assert tokens == 0
    browser.value("document.getElementById('over-2').click()")
    assert browser.value(shown) == [0, steps]


def test_every_drawing_is_told_in_words_and_every_id_is_one_thing_s(browser: Any, page: Path) -> None:
    browser.open(page, width=WIDE)
    silent = "[...document.querySelectorAll('figure')].filter(e => !(e.getAttribute('aria-label') || '').length)"
    assert browser.value(f"{silent}.length") == 0
    ids = browser.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    tables = browser.value("document.querySelectorAll('.figures table').length")
    assert tables == browser.value("document.querySelectorAll('figure').length")
