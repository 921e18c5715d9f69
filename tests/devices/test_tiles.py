"""Tiles cover exactly the pairs a mask keeps, once each, and masked ones stay small."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.interfaces.mask import MaskSpec
from torchspec.devices import _tiles
from torchspec.devices._tiles import BLOCK_ROWS, MIN_SHARED, Tile, TileKinds, tiles


def coverage(mask: MaskSpec, batch: int, queries: int, keys: int, takes: TileKinds) -> Tensor:
    """How often each (row, key) is in a tile, int [batch, queries, keys]."""
    count = torch.zeros(batch, queries, keys, dtype=torch.int64)
    whole = torch.zeros(batch, queries, dtype=torch.bool)  # rows of which one tile says all
    for tile in tiles(mask, queries, keys, torch.device("cpu"), takes):
        check_promises(tile, takes)
        rows, cols = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        if tile.keep_BQS is not None:
            seen = tile.keep_BQS
            assert tile.may_have_empty_rows or bool(seen.any(-1).all())
        else:
            seen = torch.zeros(rows, cols, dtype=torch.bool)
            row_cuts, key_cuts = tile.row_cuts or (0, rows), tile.key_cuts or (0, cols)
            for d in range(len(row_cuts) - 1):
                for row in range(row_cuts[d], row_cuts[d + 1]):
                    last = key_cuts[d + 1] - (row_cuts[d + 1] - 1 - row) * tile.causal
                    first = max(key_cuts[d], last - (tile.window or keys))
                    assert first < last, "a row without keys in a tile without a mask"
                    seen[row, first:last] = True
        assert tile.shares_rows or not bool(count[tile.batch, tile.rows].any())
        count[tile.batch, tile.rows, tile.keys] += seen.long()
        assert not bool(whole[tile.batch, tile.rows].any())
        whole[tile.batch, tile.rows] |= not tile.shares_rows
    return count


def check_promises(tile: Tile, takes: TileKinds) -> None:
    """What `Tile` and `TileKinds` say that a kernel may rely on."""
    rows, cols = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    assert rows > 0
    assert cols > 0
    if tile.keep_BQS is not None:
        assert rows <= BLOCK_ROWS
        assert tile.keep_BQS.shape[1:] == (rows, cols)
        assert (tile.causal, tile.window, tile.row_cuts, tile.key_cuts) == (False, None, None, None)
    if tile.window is not None:
        assert takes.windows
        assert tile.causal
        assert 1 <= tile.window < cols
        assert tile.row_cuts is None
    if tile.row_cuts is not None:
        assert takes.documents
        assert tile.key_cuts is not None
        assert (tile.row_cuts[0], tile.row_cuts[-1], tile.key_cuts[0], tile.key_cuts[-1]) == (0, rows, 0, cols)
        for cuts in (tile.row_cuts, tile.key_cuts):
            assert all(a < b for a, b in pairwise(cuts))
        assert len(tile.row_cuts) == len(tile.key_cuts) > 2
    elif tile.causal:
        assert rows <= cols
        assert rows == cols or takes.ramp_rows is None or rows <= takes.ramp_rows


def assert_exact(mask: MaskSpec, start: list[list[int]], end: list[list[int]], keys: int, takes: TileKinds) -> None:
    key = torch.arange(keys)
    want = (key >= torch.tensor(start)[..., None]) & (key < torch.tensor(end)[..., None])
    assert torch.equal(coverage(mask, len(start), len(start[0]), keys, takes), want.long())


KINDS = st.builds(TileKinds, st.sampled_from([None, 1, 100, 256]), st.booleans(), st.booleans())

# A row's interval as a walk: each stretch of rows holds its bounds, lets the end grow, moves both, or jumps; begins a
# document where the last one's keys end; or gives each row keys of its own.
STRETCHES = st.lists(
    st.tuples(
        st.sampled_from(["hold", "grow", "slide", "jump", "next", "own"]), st.integers(1, 90), st.integers(0, 60)
    ),
    min_size=1,
)


def walk(stretches: list[tuple[str, int, int]], rows: int) -> tuple[list[int], list[int]]:
    start, end, starts, ends = 0, 0, [], []
    for kind, length, number in stretches:
        for i in range(length):
            if kind == "jump" or (i == 0 and kind not in ("next", "own")):
                start, end = (number * (i + 1) * 7) % 50, (number * (i + 3) * 11) % 300
            if kind == "own" or (kind == "next" and i == 0):
                start, end = end, end + 1 + number % 3
            start += kind == "slide"
            end += kind in ("grow", "slide") or (kind == "next" and i > 0 and number % 2)
            starts.append(start)
            ends.append(end)
    repeats = -(-rows // len(starts))
    return (starts * repeats)[:rows], (ends * repeats)[:rows]


@settings(max_examples=60, deadline=None)
@given(
    first=STRETCHES,
    second=STRETCHES,
    rows=st.integers(1, 600),
    keys=st.integers(1, 320),
    takes=KINDS,
    batch=st.sampled_from([1, 2]),
    shared=st.sampled_from([1, 30, MIN_SHARED]),
)
def test_any_intervals(
    first: list[tuple[str, int, int]],
    second: list[tuple[str, int, int]],
    rows: int,
    keys: int,
    takes: TileKinds,
    batch: int,
    shared: int,
) -> None:
    walks = [walk(stretches, rows) for stretches in (first, second)[:batch]]
    start, end = [w[0] for w in walks], [[min(e, keys) for e in w[1]] for w in walks]
    mask = MaskSpec.limits(torch.tensor(start), torch.tensor(end))
    with patch.object(_tiles, "MIN_SHARED", shared):
        assert_exact(mask, start, end, keys, takes)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 600),
    keys=st.integers(1, 600),
    lower=st.booleans(),
    width=st.one_of(st.none(), st.integers(1, 700)),
    takes=KINDS,
)
def test_causal_and_window(rows: int, keys: int, lower: bool, width: int | None, takes: TileKinds) -> None:
    alignment = "lower_right" if lower else "upper_left"
    mask = MaskSpec.causal(alignment) if width is None else MaskSpec.sliding(width, alignment)
    last = [i + (keys - rows if lower else 0) for i in range(rows)]
    start = [0 if width is None else max(0, j - width + 1) for j in last]
    assert_exact(mask, [start], [[max(0, min(keys, j + 1)) for j in last]], keys, takes)


def test_packed_documents_need_no_mask() -> None:
    """The common training mask runs at the speed of plain causal attention: one causal tile per document."""
    first = torch.repeat_interleave(torch.tensor([0, 700, 740, 1500]), torch.tensor([700, 40, 760, 548]))
    mask = MaskSpec.limits(first[None], torch.arange(2048)[None] + 1)
    got = [(t.rows, t.keys, t.causal) for t in tiles(mask, 2048, 2048, torch.device("cpu"), TileKinds(ramp_rows=256))]
    documents = [slice(0, 700), slice(700, 740), slice(740, 1500), slice(1500, 2048)]
    assert got == [(document, document, True) for document in documents]


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_one_tile_where_the_kernel_takes_them(batch: int) -> None:
    """Also documents of one row, and those of a batch row of their own; a tail without keys ends the tile."""
    lengths = [[300, 1, 1, 7, 200, 40], [1, 548]][:batch]
    starts, ends = [], []
    for row in lengths:
        first = torch.repeat_interleave(torch.tensor([sum(row[:d]) for d in range(len(row))]), torch.tensor(row))
        starts.append(torch.cat([first, torch.full((51,), 549)])[:600])
        ends.append(torch.arange(600).clamp(max=548) + 1)
    mask = MaskSpec.limits(torch.stack(starts), torch.stack(ends))
    got = list(tiles(mask, 600, 549, torch.device("cpu"), TileKinds(ramp_rows=256, documents=True)))
    assert [(t.batch, t.rows, t.keys, t.causal) for t in got] == [
        (slice(None) if batch == 1 else slice(b, b + 1), slice(0, 549), slice(0, 549), True) for b in range(batch)
    ]
    assert got[0].row_cuts == got[0].key_cuts == (0, 300, 301, 302, 309, 509, 549)


def test_documents_that_see_all_of_themselves_are_one_tile() -> None:
    cuts = torch.tensor([0, 100, 101, 300])
    lengths = cuts.diff()
    mask = MaskSpec.limits(
        torch.repeat_interleave(cuts[:-1] * 2, lengths)[None], torch.repeat_interleave(cuts[1:] * 2, lengths)[None]
    )
    (tile,) = tiles(mask, 300, 600, torch.device("cpu"), TileKinds(documents=True))
    assert (tile.causal, tile.row_cuts, tile.key_cuts) == (False, (0, 100, 101, 300), (0, 200, 202, 600))


def test_a_window_is_one_tile_where_the_kernel_takes_it() -> None:
    def planned(width: int, queries: int, keys: int, ramp_rows: int | None = None) -> list[tuple[slice, int | None]]:
        takes = TileKinds(ramp_rows=ramp_rows, windows=True)
        mask = MaskSpec.sliding(width, "lower_right")
        return [(t.keys, t.window) for t in tiles(mask, queries, keys, torch.device("cpu"), takes)]

    assert planned(100, 1000, 1000) == [(slice(0, 1000), 100)]
    assert planned(1000, 1000, 1000) == [(slice(0, 1000), None)]
    assert planned(100, 600, 1000) == [(slice(301, 1000), 100)], "keys before the first row's window are left out"
    assert planned(100, 300, 1000, 256) == [(slice(601, 956), 100), (slice(857, 1000), 100)]


def test_a_padded_batch_needs_no_mask() -> None:
    rows = torch.arange(1000)
    ends = torch.stack([(rows + 1).clamp(max=length) for length in (1000, 600)])
    mask = MaskSpec.limits(torch.zeros_like(ends), ends)
    got = [
        (t.batch, t.rows, t.keys, t.causal)
        for t in tiles(mask, 1000, 1000, torch.device("cpu"), TileKinds(ramp_rows=256))
    ]
    assert got == [
        (slice(0, 1), slice(0, 1000), slice(0, 1000), True),
        (slice(1, 2), slice(0, 600), slice(0, 600), True),
        (slice(1, 2), slice(600, 1000), slice(0, 600), False),
    ]


@pytest.mark.parametrize("opens_after", [1, 40, 299])
@pytest.mark.parametrize("documents", [False, True])
def test_a_ramp_whose_interval_opens_late(opens_after: int, documents: bool) -> None:
    """The end grows from below the start: the first rows of the run see nothing, also where a document ends there."""
    start = [0] * 50 + [50] * 300
    end = [i + 1 for i in range(50)] + [i + 51 - opens_after for i in range(300)]
    mask = MaskSpec.limits(torch.tensor([start]), torch.tensor([end]))
    assert_exact(mask, [start], [end], 400, TileKinds(documents=documents))


def test_a_row_without_keys_parts_documents() -> None:
    start, end = list(range(300)), list(range(1, 301))
    for row in range(150, 300):  # row 150 sees nothing, and those after it go on with its keys
        start[row], end[row] = row - (row > 150), row
    mask = MaskSpec.limits(torch.tensor([start]), torch.tensor([end]))
    assert_exact(mask, [start], [end], 300, TileKinds(documents=True))


def test_a_window_past_the_last_key() -> None:
    start, end = [max(0, i - 4) for i in range(60)], [min(20, i + 1) for i in range(60)]
    start = [min(s, 20) for s in start]
    assert_exact(MaskSpec.sliding(5), [start], [end], 20, TileKinds(windows=True))


def test_what_all_rows_of_a_block_see_needs_no_mask() -> None:
    """The context of drafted blocks: 16 slots each, whose anchors are 8 tokens apart."""
    ends = 1000 + 8 * torch.arange(32).repeat_interleave(16)
    starts = (ends - 900).clamp_min(200)
    mask = MaskSpec.limits(starts[None], ends[None])
    got = [
        (t.rows, t.keys, t.keep_BQS is not None)
        for t in tiles(mask, 512, 2000, torch.device("cpu"), TileKinds(ramp_rows=256))
    ]
    first, second = slice(0, 256), slice(256, 512)
    assert got == [
        (first, slice(220, 1000), False), (first, slice(200, 220), True), (first, slice(1000, 1120), True),
        (second, slice(348, 1128), False), (second, slice(228, 348), True), (second, slice(1128, 1248), True),
    ]  # fmt: skip


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_nothing_to_cover(queries: int, keys: int) -> None:
    assert not list(tiles(MaskSpec.causal("lower_right"), queries, keys, torch.device("cpu"), TileKinds()))
