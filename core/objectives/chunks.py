"""Cutting the loss into chunks of target rows, so that nothing of size [all rows, vocabulary] is ever alive.

Shape letters: M supervised (slot, step) pairs grouped by step, R target rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FEWEST_ROWS, MOST_ROWS = 128, 2048


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Target rows [start, stop) and, for each step, the pairs [lo, hi) of the M that they teach."""

    start: int
    stop: int
    pairs: tuple[tuple[int, int], ...]


def chunk_rows(vocabulary: int, temporary_bytes: int) -> int:
    """Rows whose fp32 logits fit the device's temporaries; never so few that per-chunk work dominates."""
    return max(FEWEST_ROWS, min(MOST_ROWS, temporary_bytes // (4 * vocabulary)))


def plan_chunks(row_M: Tensor, sizes: Sequence[int], rows: int, most_rows: int) -> tuple[Chunk, ...]:
    """`row_M` on the CPU: each pair's target row in 0..rows-1, ascending within each step's `sizes[k]` pairs."""
    starts = range(0, rows, most_rows)
    edges = torch.tensor([*starts, rows])
    pieces = []
    first = 0
    for row_m in torch.split(row_M, list(sizes)):
        cuts = (torch.searchsorted(row_m, edges) + first).tolist()
        pieces.append(list(pairwise(cuts)))
        first += row_m.numel()
    return tuple(
        Chunk(start=start, stop=min(start + most_rows, rows), pairs=tuple(piece[place] for piece in pieces))
        for place, start in enumerate(starts)
    )
