"""Tiles cover exactly the pairs a mask keeps, once each, and masked ones stay small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.interfaces.mask import MaskSpec
from torchspec.devices._tiles import BLOCK_ROWS, tiles


def coverage(mask: MaskSpec, batch: int, queries: int, keys: int, ramp_rows: int | None) -> Tensor:
    """How often each (row, key) is in a tile, int [batch, queries, keys]."""
    count = torch.zeros(batch, queries, keys, dtype=torch.int64)
    for tile in tiles(mask, queries, keys, torch.device("cpu"), ramp_rows):
        rows, cols = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        assert rows > 0
        assert cols > 0
        if tile.causal:
            assert tile.keep_BQS is None
            assert rows <= cols
            assert rows == cols or ramp_rows is None or rows <= ramp_rows
            seen = torch.arange(cols)[None] <= torch.arange(rows)[:, None] + cols - rows
        elif tile.keep_BQS is not None:
            assert rows <= BLOCK_ROWS
            assert tile.keep_BQS.shape[1:] == (rows, cols)
            seen = tile.keep_BQS
            assert tile.may_have_empty_rows or bool(seen.any(-1).all())
        else:
            seen = torch.ones(rows, cols, dtype=torch.bool)
        count[tile.batch, tile.rows, tile.keys] += seen.long()
    return count


def assert_exact(mask: MaskSpec, start: list[list[int]], end: list[list[int]], keys: int, ramp: int | None) -> None:
    key = torch.arange(keys)
    want = (key >= torch.tensor(start)[..., None]) & (key < torch.tensor(end)[..., None])
    assert torch.equal(coverage(mask, len(start), len(start[0]), keys, ramp), want.long())


# A row's interval as a walk: each stretch of rows holds its bounds, lets the end grow, moves both, or jumps.
STRETCHES = st.lists(
    st.tuples(st.sampled_from(["hold", "grow", "slide", "jump"]), st.integers(1, 90), st.integers(0, 60)), min_size=1
)


def walk(stretches: list[tuple[str, int, int]], rows: int) -> tuple[list[int], list[int]]:
    start, end, starts, ends = 0, 0, [], []
    for kind, length, number in stretches:
        for i in range(length):
            if kind == "jump" or i == 0:
                start, end = (number * (i + 1) * 7) % 50, (number * (i + 3) * 11) % 300
            start += kind == "slide"
            end += kind in ("grow", "slide")
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
    ramp_rows=st.sampled_from([None, 1, 100, 256]),
    batch=st.sampled_from([1, 2]),
)
def test_any_intervals(
    first: list[tuple[str, int, int]],
    second: list[tuple[str, int, int]],
    rows: int,
    keys: int,
    ramp_rows: int | None,
    batch: int,
) -> None:
    walks = [walk(stretches, rows) for stretches in (first, second)[:batch]]
    start, end = [w[0] for w in walks], [[min(e, keys) for e in w[1]] for w in walks]
    mask = MaskSpec.limits(torch.tensor(start), torch.tensor(end))
    assert_exact(mask, start, end, keys, ramp_rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 600),
    keys=st.integers(1, 600),
    lower=st.booleans(),
    width=st.one_of(st.none(), st.integers(1, 700)),
    ramp_rows=st.sampled_from([None, 1, 100, 256]),
)
def test_causal_and_window(rows: int, keys: int, lower: bool, width: int | None, ramp_rows: int | None) -> None:
    alignment = "lower_right" if lower else "upper_left"
    mask = MaskSpec.causal(alignment) if width is None else MaskSpec.sliding(width, alignment)
    last = [i + (keys - rows if lower else 0) for i in range(rows)]
    start = [0 if width is None else max(0, j - width + 1) for j in last]
    assert_exact(mask, [start], [[max(0, min(keys, j + 1)) for j in last]], keys, ramp_rows)


def test_packed_documents_need_no_mask() -> None:
    """The common training mask runs at the speed of plain causal attention: one causal tile per document."""
    first = torch.repeat_interleave(torch.tensor([0, 700, 740, 1500]), torch.tensor([700, 40, 760, 548]))
    mask = MaskSpec.limits(first[None], torch.arange(2048)[None] + 1)
    got = [(t.rows, t.keys, t.causal) for t in tiles(mask, 2048, 2048, torch.device("cpu"), 256)]
    documents = [slice(0, 700), slice(700, 740), slice(740, 1500), slice(1500, 2048)]
    assert got == [(document, document, True) for document in documents]


def test_a_padded_batch_needs_no_mask() -> None:
    rows = torch.arange(1000)
    ends = torch.stack([(rows + 1).clamp(max=length) for length in (1000, 600)])
    mask = MaskSpec.limits(torch.zeros_like(ends), ends)
    got = [(t.batch, t.rows, t.keys, t.causal) for t in tiles(mask, 1000, 1000, torch.device("cpu"), 256)]
    assert got == [
        (slice(0, 1), slice(0, 1000), slice(0, 1000), True),
        (slice(1, 2), slice(0, 600), slice(0, 600), True),
        (slice(1, 2), slice(600, 1000), slice(0, 600), False),
    ]


@pytest.mark.parametrize("opens_after", [1, 40, 299])
def test_a_ramp_whose_interval_opens_late(opens_after: int) -> None:
    """The end grows from below the start: the first rows of the run see nothing."""
    start, end = [20] * 300, [i + 21 - opens_after for i in range(300)]
    mask = MaskSpec.limits(torch.tensor([start]), torch.tensor([end]))
    assert_exact(mask, [start], [end], 400, None)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_nothing_to_cover(queries: int, keys: int) -> None:
    assert not list(tiles(MaskSpec.causal("lower_right"), queries, keys, torch.device("cpu"), None))
