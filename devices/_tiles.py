"""Cuts an attention mask into tiles that flash kernels know how to run, so that no [Q, S] mask is ever built.

Kernels know three shapes: every row sees every key; causal; and a small block with a boolean mask. Every `MaskSpec`
is a list of these. What is regular in a mask (a packed document, a padded tail, a prefix) becomes one long tile
without a mask; only irregular rows are taken in blocks of `BLOCK_ROWS`, each against the keys its rows can see.

Shape letters: B batch, Q query rows, S key rows. Rows and keys are half-open intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchspec.devices.api import MaskSpec

BLOCK_ROWS = 256
"""Rows of a masked block: its mask is at most [B, 256, S]."""

MIN_RUN = 32
"""Shorter regular runs share a masked block with their neighbours: one call costs more than a few masked rows."""

EVERY_ROW = slice(None)
_CONSTANT, _RAMP, _BREAK = 0, 1, 2


class Tile(NamedTuple):
    """Query rows against a range of keys.

    causal     the last row sees every key of the tile, each row before it one key less (alignment lower right);
               a tile has at least as many keys as rows, so each row sees one at least
    keep_BQS   which keys each row sees, bool [1 or batch rows, rows, keys]; None if all, or if causal
    may_have_empty_rows   only with keep_BQS: a row may see no key
    """

    rows: slice
    keys: slice
    batch: slice = EVERY_ROW
    causal: bool = False
    keep_BQS: Tensor | None = None
    may_have_empty_rows: bool = False


def tiles(mask: MaskSpec, queries: int, keys: int, device: torch.device, ramp_rows: int | None) -> Iterator[Tile]:
    """Tiles covering every (row, key) pair that `mask` keeps: each row is in one tile, or in none if it sees nothing.

    `ramp_rows` is the most rows the kernel takes in a causal tile with more keys than rows; None is any number.
    """
    if queries == 0 or keys == 0:
        return
    if mask.kind == "full":
        yield Tile(rows=slice(0, queries), keys=slice(0, keys))
    elif mask.kind == "causal":
        yield from _causal(mask, queries, keys, ramp_rows)
    elif mask.kind == "dense":
        assert mask.keep_BQS is not None
        for start in range(0, queries, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, queries))
            keep_BQS = mask.keep_BQS[:, rows]
            yield Tile(rows=rows, keys=slice(0, keys), keep_BQS=keep_BQS, may_have_empty_rows=True)
    else:
        # On the host, where the tiles are planned; `.cpu()` costs something for limits on a device alone.
        start_BQ, end_BQ = (bound_BQ.cpu() for bound_BQ in mask.bounds(queries, keys, torch.device("cpu")))
        if queries <= BLOCK_ROWS:
            yield from _block(start_BQ, end_BQ, slice(0, queries), EVERY_ROW, device)
            return
        batches = max(start_BQ.shape[0], end_BQ.shape[0])
        start_BQ, end_BQ = start_BQ.expand(batches, -1), end_BQ.expand(batches, -1)
        for row in range(batches):
            batch = EVERY_ROW if batches == 1 else slice(row, row + 1)
            yield from _intervals(start_BQ[row : row + 1], end_BQ[row : row + 1], batch, ramp_rows, device)


def _causal(mask: MaskSpec, queries: int, keys: int, ramp_rows: int | None) -> Iterator[Tile]:
    offset = keys - queries if mask.alignment == "lower_right" else 0
    first = max(0, -offset)  # rows before it see nothing
    last = min(queries, keys - offset)  # rows from it on see every key
    yield from _ramp(slice(first, last), slice(0, last + offset), EVERY_ROW, ramp_rows)
    if last < queries:
        yield Tile(rows=slice(last, queries), keys=slice(0, keys))


def _ramp(rows: slice, keys: slice, batch: slice, ramp_rows: int | None) -> Iterator[Tile]:
    count = rows.stop - rows.start
    if count == 1:
        yield Tile(rows=rows, keys=keys, batch=batch)
    elif ramp_rows is None or count <= ramp_rows or count == keys.stop - keys.start:
        yield Tile(rows=rows, keys=keys, batch=batch, causal=True)
    else:
        for start in range(rows.start, rows.stop, ramp_rows):
            end = min(start + ramp_rows, rows.stop)
            visible = slice(keys.start, keys.stop - (rows.stop - end))
            yield from _ramp(slice(start, end), visible, batch, ramp_rows)


def _intervals(
    start_BQ: Tensor, end_BQ: Tensor, batch: slice, ramp_rows: int | None, device: torch.device
) -> Iterator[Tile]:
    """Tiles of one row of interval bounds [1, Q]."""
    start, end = start_BQ[0], end_BQ[0]
    pending = 0  # first row of those that wait to be taken in masked blocks
    for kind, first, stop in _runs(start, end):
        if kind == _BREAK or stop - first < MIN_RUN:
            continue
        yield from _blocks(start_BQ, end_BQ, slice(pending, first), batch, device)
        pending = stop
        key_start, key_end = int(start[first]), int(end[stop - 1])
        if kind == _RAMP:
            # A ramp may begin before its interval opens: those rows see nothing.
            first = max(first, stop - (key_end - key_start))
            if first < stop:
                yield from _ramp(slice(first, stop), slice(key_start, key_end), batch, ramp_rows)
        elif key_start < key_end:
            yield Tile(rows=slice(first, stop), keys=slice(key_start, key_end), batch=batch)
    yield from _blocks(start_BQ, end_BQ, slice(pending, len(start)), batch, device)


def _runs(start_Q: Tensor, end_Q: Tensor) -> Iterator[tuple[int, int, int]]:
    """(kind, first row, one past the last) of runs in which the bounds stay, or only the end grows by one a row."""
    growth = end_Q.diff()
    regular = (start_Q.diff() == 0) & ((growth == _CONSTANT) | (growth == _RAMP))
    steps = torch.where(regular, growth, _BREAK)
    kinds, counts = torch.unique_consecutive(steps, return_counts=True)
    given, row = 0, 0  # rows before `given` belong to earlier runs; `row` is the first row of this run of differences
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        row += count
        stop = row if kind == _BREAK else row + 1  # a difference joins two rows; a break leaves the second to the next
        if stop > given:
            yield kind, given, stop
            given = stop
    if given < len(start_Q):
        yield _BREAK, given, len(start_Q)


def _blocks(start_BQ: Tensor, end_BQ: Tensor, rows: slice, batch: slice, device: torch.device) -> Iterator[Tile]:
    for start in range(rows.start, rows.stop, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, rows.stop))
        yield from _block(start_BQ[:, block], end_BQ[:, block], block, batch, device)


def _block(start_BQ: Tensor, end_BQ: Tensor, rows: slice, batch: slice, device: torch.device) -> Iterator[Tile]:
    """One tile over the keys that any of these rows sees; a mask only where the rows differ."""
    summary = (*start_BQ.aminmax(), *end_BQ.aminmax(), (end_BQ - start_BQ).amin())
    low, last_start, first_end, high, shortest = torch.stack(summary).tolist()
    if low >= high:
        return
    keys = slice(low, high)
    if low == last_start and high == first_end:
        yield Tile(rows=rows, keys=keys, batch=batch)
        return
    key = torch.arange(low, high, device=device)
    start_BQ, end_BQ = (bound_BQ.to(device, non_blocking=True) for bound_BQ in (start_BQ, end_BQ))
    keep_BQS = (key >= start_BQ[..., None]) & (key < end_BQ[..., None])
    yield Tile(rows=rows, keys=keys, batch=batch, keep_BQS=keep_BQS, may_have_empty_rows=shortest <= 0)
