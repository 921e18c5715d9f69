"""Cutting target rows into chunks, against a pair-by-pair account; and what a chunk may weigh."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.core.objectives import chunks
from torchspec.core.objectives.chunks import (
    FEWEST_ROWS,
    Chunk,
    LossShape,
    ShardLogits,
    chunk_rows,
    plan_chunks,
    token_spans,
    vocabulary_tile,
)


@st.composite
def taught_rows(draw: st.DrawFn) -> tuple[int, list[list[int]], int]:
    """(rows, the rows that each step teaches, most rows of a chunk)."""
    rows = draw(st.integers(1, 40))
    any_rows = st.sets(st.integers(0, rows - 1)).map(sorted)
    return rows, draw(st.lists(any_rows, min_size=1, max_size=4)), draw(st.integers(1, 45))


def plan(rows: int, taught: list[list[int]], most: int) -> tuple[Chunk, ...]:
    row_M = torch.tensor([row for step in taught for row in step], dtype=torch.int64)
    return plan_chunks(row_M, [len(step) for step in taught], rows, most)


@settings(max_examples=200, deadline=None)
@given(taught_rows())
def test_every_pair_is_in_the_chunk_of_its_row_once(case: tuple[int, list[list[int]], int]) -> None:
    _, taught, _ = case
    row_of = [row for step in taught for row in step]
    seen: list[int] = []
    for chunk in plan(*case):
        assert len(chunk.pairs) == len(taught)
        stacked = [pair for lo, hi in chunk.pairs for pair in range(lo, hi)]
        assert len(stacked) == chunk.count
        assert all(chunk.start <= row_of[pair] < chunk.stop for pair in stacked)
        told: list[int] = []
        for first, last, row in chunk.runs:
            assert first == len(told) < last
            told += range(row, row + last - first)
        assert told == [row_of[pair] - chunk.start for pair in stacked]
        seen += stacked
    assert sorted(seen) == list(range(len(row_of)))


@settings(max_examples=200, deadline=None)
@given(taught_rows())
def test_chunks_follow_each_other_and_are_as_equal_as_they_can_be(case: tuple[int, list[list[int]], int]) -> None:
    rows, _, most = case
    made = plan(*case)
    lengths = [chunk.stop - chunk.start for chunk in made]
    assert [chunk.start for chunk in made] == [sum(lengths[:place]) for place in range(len(made))]
    assert sum(lengths) == rows
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert (len(made) - 1) * most < rows, "one chunk less would not do"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.integers(FEWEST_ROWS, 1000))
def test_spans_of_tokens_are_whole_even_and_never_small(tokens: int, most: int) -> None:
    spans = token_spans(tokens, most)
    lengths = [span.stop - span.start for span in spans]
    assert [token for span in spans for token in range(span.start, span.stop)] == list(range(tokens))
    if tokens:
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= FEWEST_ROWS or lengths == [tokens]
        assert max(lengths) <= most or most < 2 * FEWEST_ROWS > max(lengths)
        assert (len(spans) - 1) * most < tokens, "one span less would not do"


def test_no_rows_make_no_chunks() -> None:
    assert plan(0, [[], []], 4) == ()


def test_runs_are_as_long_as_the_rows_follow_each_other() -> None:
    (chunk,) = plan(9, [[0, 1, 2, 5, 6], [1, 3, 4]], 9)
    assert chunk.pairs == ((0, 5), (5, 8))
    assert chunk.runs == ((0, 3, 0), (3, 5, 5), (5, 6, 1), (6, 8, 3))


def test_tiles_of_the_vocabulary_are_near_equal_and_small() -> None:
    for vocabulary in (1, 5, 8192, 8193, 32_000, 151_936, 256_000):
        tile = vocabulary_tile(vocabulary)
        count = -(-vocabulary // tile)
        assert tile <= chunks.LARGEST_TILE
        assert count == -(-vocabulary // chunks.LARGEST_TILE)
        assert count * tile - vocabulary < count, "every tile but for a column each is full"


def row_bytes(shape: LossShape) -> int:
    """Buffers of one target row, counted one by one."""
    half = shape.itemsize == 2
    logits = 4 * shape.draft_vocabulary + (2 * shape.draft_vocabulary if half else 0)
    output, normed, dnormed, doutput = 4 * [shape.itemsize * shape.hidden]
    unit, wide_gradient = 2 * [4 * shape.hidden]
    raw, probabilities, times_mass = 3 * [4 * shape.draft_vocabulary]
    logs = 4 * shape.draft_vocabulary if shape.with_logs else 0
    held = -(-shape.target_vocabulary // shape.ranks)
    tile = shape.ranks * 4 * min(held, -(-held // -(-held // 8192)))
    pair = logits + output + normed + dnormed + doutput + unit + wide_gradient
    state = shape.ranks * shape.itemsize * shape.hidden
    shared = 0
    if shape.ranks > 1:
        padded, gathered = 2 * [state]
        shared = padded + gathered
        if shape.shard_logits == "tokens":
            parts, copied, received = 3 * [shape.itemsize * shape.draft_vocabulary]
            shared += parts + copied + received
        else:
            padded, gathered, partial, copied, received = 5 * [state]
            pair += padded + gathered + partial + copied + received
    return shape.steps * pair + raw + probabilities + times_mass + logs + tile + shared


@pytest.mark.parametrize(
    ("steps", "draft", "target"), [(1, 64, 64), (7, 1_000, 4_000), (7, 32_000, 151_936), (3, 128_256, 128_256)]
)
@pytest.mark.parametrize("budget", [1 << 10, 48 << 20, 4 << 30])
@pytest.mark.parametrize(("ranks", "form"), [(1, "tokens"), (3, "tokens"), (8, "vocabulary")])
def test_a_chunk_fills_its_budget_and_never_falls_below_128_rows(
    steps: int, draft: int, target: int, budget: int, ranks: int, form: ShardLogits
) -> None:
    for itemsize, with_logs in ((4, False), (2, True)):
        shape = LossShape(
            steps=steps,
            hidden=512,
            draft_vocabulary=draft,
            target_vocabulary=target,
            itemsize=itemsize,
            with_logs=with_logs,
            ranks=ranks,
            shard_logits=form,
        )
        rows, each = chunk_rows(shape, budget), row_bytes(shape)
        if 128 * each > budget:
            assert rows == 128
        else:
            assert rows * each <= budget < (rows + 1) * each
