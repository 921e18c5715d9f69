"""The drawings of the documentation are what ci/drawings.py draws, stand in a page with words for who cannot see them,
and say what the definitions say."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"
NAMES = ("block-mask.svg", "pipelines.svg", "ttt-mask.svg", "usp.svg")


@pytest.fixture(scope="module")
def drawings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "ci" / "drawings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_drawings_are_current(drawings: ModuleType, name: str) -> None:
    assert (FOLDER / name).read_text() == str(drawings.DRAWINGS[name]()), "run: python ci/drawings.py docs/images"


def test_every_drawing_stands_in_a_page_with_a_text() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.svg")) == list(NAMES)
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in NAMES:
        assert re.search(rf"!\[[^\]]{{40,}}\]\(images/{name}\)", pages), name


def _cells(name: str, colour: str) -> list[tuple[float, float]]:
    """Upper left corners of the cells of a colour, without the legend's."""
    root = ElementTree.fromstring((FOLDER / name).read_text())
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    return [
        (float(r.attrib["x"]), float(r.attrib["y"]))
        for r in rects
        if r.attrib["fill"] == colour and r.attrib["width"] == "19"
    ]


def test_the_unrolls_mask_has_its_triangles_and_diagonals(drawings: ModuleType) -> None:
    """Of 6 slots over 3 steps: 3 triangles of 21; one diagonal of 6 at step 1, two at step 2."""
    assert len(_cells("ttt-mask.svg", drawings.BLUE)) == 3 * 21
    assert len(_cells("ttt-mask.svg", drawings.ORANGE)) == (1 + 2) * 6


def test_blocks_see_what_is_before_their_anchor_and_themselves(drawings: ModuleType) -> None:
    assert len(_cells("block-mask.svg", drawings.BLUE)) == 4 * (3 + 5 + 9)
    assert len(_cells("block-mask.svg", drawings.ORANGE)) == 3 * 4 * 4


def test_every_rank_holds_as_much_in_each_form(drawings: ModuleType) -> None:
    """16 tokens x 4 heads over 4 ranks, in three panels; at rest rank 0 owns the first and the last two tokens."""
    for colour in drawings.RANKS:
        assert len(_cells("usp.svg", colour)) == 3 * 16
    first = _cells("usp.svg", drawings.RANKS[0])[:16]
    assert sorted({x for x, _ in first}) == [108 + drawings.CELL * token for token in (0, 1, 14, 15)]
