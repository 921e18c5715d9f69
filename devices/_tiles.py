"""Cuts an attention mask into tiles that flash kernels know how to run, so that no [Q, S] mask is ever built.

Every kernel knows three shapes: every row sees every key; causal; and a small block with a boolean mask. Every
`MaskSpec` is a list of these. What is regular in a mask (a packed document, a padded tail, a prefix) becomes one long
tile without a mask; only irregular rows are taken in blocks of `BLOCK_ROWS`, each against the keys its rows can see.
Of those keys, a long stretch that all of a block's rows see is a tile of its own, without a mask.
Kernels that say so (`TileKinds`) are also given sliding windows, and many packed documents as one tile.

Shape letters: B batch, Q query rows, S key rows. Rows and keys are half-open intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torchspec.devices.api import MaskSpec, to_device

BLOCK_ROWS = 256
"""Rows of a masked block: its mask is at most [B, 256, S]."""

MIN_RUN = 32
"""Shorter regular runs share a masked block with their neighbours: one call costs more than a few masked rows."""

MIN_SHARED = 512
"""Fewer keys that all rows of a block see stay under its mask. On a CPU a tile of its own gains from some 1,000 on (8 %
of forward and backward, `benchmarks/attention.py`); where masked tiles go to a slower kernel, earlier."""

EVERY_ROW = slice(None)
_CONSTANT, _RAMP, _BREAK, _JOIN = 0, 1, 2, 3


class TileKinds(NamedTuple):
    """What a kernel takes beyond full, square causal and masked tiles.

    ramp_rows  most rows of a causal tile with more keys than rows, if it is not one of documents; None is any number
    windows    causal tiles with a `window`
    documents  tiles with `row_cuts` and `key_cuts`, causal or not
    """

    ramp_rows: int | None = None
    windows: bool = False
    documents: bool = False


class Tile(NamedTuple):
    """Query rows against a range of keys.

    causal     the last row sees every key of the tile, each row before it one key less (alignment lower right);
               a tile has at least as many keys as rows, so each row sees one at least
    keep_BQS   which keys each row sees, bool [1 or batch rows, rows, keys]; None if all, or if causal
    may_have_empty_rows   only with keep_BQS: a row may see no key
    window     only with causal: of the keys that it lets a row see, the row sees the last `window` (1 or more) alone
    shares_rows   other tiles have the same rows, with other keys; their results are merged
    row_cuts, key_cuts    documents, without keep_BQS and window: rows row_cuts[d]:row_cuts[d + 1] of the tile see, of
               its keys, none but key_cuts[d]:key_cuts[d + 1]; `causal` then holds within each document. Each has a row
               at least and a key, or as many keys as rows if causal. Cuts begin with 0 and end with the tile's count
    """

    rows: slice
    keys: slice
    batch: slice = EVERY_ROW
    causal: bool = False
    keep_BQS: Tensor | None = None
    may_have_empty_rows: bool = False
    shares_rows: bool = False
    window: int | None = None
    row_cuts: tuple[int, ...] | None = None
    key_cuts: tuple[int, ...] | None = None

    def documents(self) -> Iterator[tuple[slice, slice]]:
        """(rows, keys) of each document, counted from the tile's first ones; all of them where there are no cuts."""
        row_cuts = self.row_cuts or (0, self.rows.stop - self.rows.start)
        key_cuts = self.key_cuts or (0, self.keys.stop - self.keys.start)
        for rows, keys in zip(pairwise(row_cuts), pairwise(key_cuts), strict=True):
            yield slice(*rows), slice(*keys)


def tiles(mask: MaskSpec, queries: int, keys: int, device: torch.device, takes: TileKinds) -> Iterator[Tile]:
    """Tiles covering every (row, key) pair that `mask` keeps, once each."""
    if queries == 0 or keys == 0:
        return
    if mask.kind == "full":
        yield Tile(rows=slice(0, queries), keys=slice(0, keys))
    elif mask.kind == "causal" or (mask.kind == "window" and takes.windows):
        yield from _diagonal(mask, queries, keys, takes, device)
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
            yield from _intervals(start_BQ[row : row + 1], end_BQ[row : row + 1], batch, takes, device)


def _diagonal(mask: MaskSpec, queries: int, keys: int, takes: TileKinds, device: torch.device) -> Iterator[Tile]:
    """Tiles of a causal mask or a sliding window."""
    offset = keys - queries if mask.alignment == "lower_right" else 0
    first = max(0, -offset)  # rows before it see nothing
    last = min(queries, keys - offset)  # rows from it on are past the last key
    window = mask.window if mask.kind == "window" else None
    yield from _ramp(slice(first, last), slice(0, last + offset), EVERY_ROW, takes.ramp_rows, window)
    if last == queries:
        return
    if window is None:
        yield Tile(rows=slice(last, queries), keys=slice(0, keys))
    else:
        start_BQ, end_BQ = mask.bounds(queries, keys, torch.device("cpu"))
        still_seeing = slice(last, min(queries, last + window - 1))
        yield from _blocks(start_BQ, end_BQ, still_seeing, EVERY_ROW, device)


def _ramp(rows: slice, keys: slice, batch: slice, ramp_rows: int | None, window: int | None = None) -> Iterator[Tile]:
    count = rows.stop - rows.start
    if window is not None:
        keys = slice(max(keys.start, keys.stop - count + 1 - window), keys.stop)  # the first row sees the fewest
        window = None if window >= keys.stop - keys.start else window
    if count == 1:
        yield Tile(rows=rows, keys=keys, batch=batch)
    elif ramp_rows is None or count <= ramp_rows or count == keys.stop - keys.start:
        yield Tile(rows=rows, keys=keys, batch=batch, causal=True, window=window)
    else:
        for start in range(rows.start, rows.stop, ramp_rows):
            end = min(start + ramp_rows, rows.stop)
            visible = slice(keys.start, keys.stop - (rows.stop - end))
            yield from _ramp(slice(start, end), visible, batch, ramp_rows, window)


def _intervals(
    start_BQ: Tensor, end_BQ: Tensor, batch: slice, takes: TileKinds, device: torch.device
) -> Iterator[Tile]:
    """Tiles of one row of interval bounds [1, Q]."""
    pending = 0  # first row of those that wait to be taken in masked blocks
    for group in _groups(_runs(start_BQ[0], end_BQ[0], takes.documents), takes.documents):
        first, stop = group[0].first, group[-1].stop
        if stop - first < MIN_RUN:
            continue
        yield from _blocks(start_BQ, end_BQ, slice(pending, first), batch, device)
        pending = stop
        if len(group) > 1 or group[0].kind == _JOIN:
            yield _documents(group, end_BQ[0], batch)
        else:
            yield from _alone(group[0], batch, takes.ramp_rows)
    yield from _blocks(start_BQ, end_BQ, slice(pending, start_BQ.shape[1]), batch, device)


class _Run(NamedTuple):
    """Rows first:stop and the keys that any of them sees.

    Constant: all of them see these keys. Ramp: the last row does, each row before it one key less, down to none. Join:
    each row sees keys of its own, which begin where those of the row before end. Break: none of these.
    """

    kind: int
    first: int
    stop: int
    key_start: int
    key_end: int

    def seeing(self) -> int:
        """The first row that sees a key: a ramp may begin before its interval opens."""
        return max(self.first, self.stop - (self.key_end - self.key_start)) if self.kind == _RAMP else self.first


def _alone(run: _Run, batch: slice, ramp_rows: int | None) -> Iterator[Tile]:
    rows, keys = slice(run.seeing(), run.stop), slice(run.key_start, run.key_end)
    if rows.start >= rows.stop or keys.start >= keys.stop:
        return
    if run.kind == _RAMP:
        yield from _ramp(rows, keys, batch, ramp_rows)
    else:
        yield Tile(rows=rows, keys=keys, batch=batch)


def _documents(group: list[_Run], end_Q: Tensor, batch: slice) -> Tile:
    """One tile of runs that join. A run is one document, but each row of a joining run is one of its own."""
    row, key = group[0].seeing(), group[0].key_start
    row_cuts, key_cuts = [0], [0]
    for run in group:
        each = run.kind == _JOIN
        row_cuts += [stop - row for stop in (range(run.first + 1, run.stop + 1) if each else [run.stop])]
        key_cuts += [end - key for end in (end_Q[run.first : run.stop].tolist() if each else [run.key_end])]
    return Tile(
        rows=slice(row, row + row_cuts[-1]),
        keys=slice(key, key + key_cuts[-1]),
        batch=batch,
        causal=any(run.kind == _RAMP for run in group),
        row_cuts=tuple(row_cuts),
        key_cuts=tuple(key_cuts),
    )


def _groups(runs: list[_Run], documents: bool) -> Iterator[list[_Run]]:
    """The regular runs, together where one tile of documents takes them: each continues the rows and keys of the one
    before, and all are constant or all ramps."""
    group: list[_Run] = []
    kind = _JOIN  # of the group, as far as it is known: rows that join fit either
    for run in runs:
        if run.kind == _BREAK:
            continue
        fits = documents and group and _continues(group[-1], run) and (kind == run.kind or _JOIN in (kind, run.kind))
        if group and not fits:
            yield group
            group, kind = [], _JOIN
        group.append(run)
        kind = kind if run.kind == _JOIN else run.kind
    if group:
        yield group


def _continues(before: _Run, run: _Run) -> bool:
    touch = (before.stop, before.key_end) == (run.first, run.key_start)
    return touch and before.key_start < before.key_end and run.key_start < run.key_end and run.seeing() == run.first


def _runs(start_Q: Tensor, end_Q: Tensor, documents: bool) -> list[_Run]:
    """The rows in order, as runs in which each row follows the one before it in the same way.

    Joins are told from breaks for kernels that take documents alone.
    """
    growth = end_Q.diff()
    regular = (start_Q.diff() == 0) & ((growth == _CONSTANT) | (growth == _RAMP))
    steps = torch.where(regular, growth, _BREAK)
    if documents:
        sees = start_Q < end_Q
        steps[(start_Q[1:] == end_Q[:-1]) & sees[1:] & sees[:-1]] = _JOIN
    kinds, counts = torch.unique_consecutive(steps, return_counts=True)
    spans, given, row = [], 0, 0  # rows before `given` are in earlier runs; `row` is the first row of these steps
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        row += count
        stop = row if kind in (_BREAK, _JOIN) else row + 1  # a row that joins or breaks away is left to the next run
        if stop > given:
            spans.append((kind, given, stop))
            given = stop
    if given < len(start_Q):
        spans.append((_JOIN if documents else _BREAK, given, len(start_Q)))
    firsts, stops = torch.tensor(spans)[:, 1:].T
    bounds = zip(start_Q[firsts].tolist(), end_Q[stops - 1].tolist(), strict=True)
    return [_Run(*span, *keys) for span, keys in zip(spans, bounds, strict=True)]


def _blocks(start_BQ: Tensor, end_BQ: Tensor, rows: slice, batch: slice, device: torch.device) -> Iterator[Tile]:
    for start in range(rows.start, rows.stop, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, rows.stop))
        yield from _block(start_BQ[:, block], end_BQ[:, block], block, batch, device)


def _block(start_BQ: Tensor, end_BQ: Tensor, rows: slice, batch: slice, device: torch.device) -> Iterator[Tile]:
    """Tiles over the keys that any of these rows sees; a mask only over those that some row does not see."""
    summary = (*start_BQ.aminmax(), *end_BQ.aminmax(), (end_BQ - start_BQ).amin())
    low, last_start, first_end, high, shortest = torch.stack(summary).tolist()
    if low >= high:
        return
    if low == last_start and high == first_end:
        yield Tile(rows=rows, keys=slice(low, high), batch=batch)
        return
    start_BQ, end_BQ = (to_device(bound_BQ, device) for bound_BQ in (start_BQ, end_BQ))
    if rows.stop - rows.start < MIN_RUN or first_end - last_start < MIN_SHARED:
        yield _masked(start_BQ, end_BQ, rows, slice(low, high), batch)._replace(may_have_empty_rows=shortest <= 0)
        return
    yield Tile(rows=rows, keys=slice(last_start, first_end), batch=batch, shares_rows=True)
    for keys in (slice(low, last_start), slice(first_end, high)):
        if keys.start < keys.stop:
            edge = _masked(start_BQ, end_BQ, rows, keys, batch)
            yield edge._replace(may_have_empty_rows=True, shares_rows=True)


def _masked(start_BQ: Tensor, end_BQ: Tensor, rows: slice, keys: slice, batch: slice) -> Tile:
    key = torch.arange(keys.start, keys.stop, device=start_BQ.device)
    keep_BQS = (key >= start_BQ[..., None]) & (key < end_BQ[..., None])
    return Tile(rows=rows, keys=keys, batch=batch, keep_BQS=keep_BQS)
