"""Cutting the loss into chunks of target rows, so that nothing of size [all rows, vocabulary] is ever alive.

A chunk stacks the pairs of all steps that its target rows teach: one product for all of them.

Shape letters: M supervised (slot, step) pairs grouped by step, R target rows, C stacked pairs of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FEWEST_ROWS = 128
"""Below it, work done once per chunk (and later once per collective) weighs more than the rows."""

LARGEST_TILE = 8192


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Target rows [start, stop) and the pairs they teach, stacked step after step.

    pairs    for each step, the range of the M that these rows teach; they stand one after the other in the stack
    runs     (first, last, row): the stack's places first..last-1 are taught by the chunk's rows row, row + 1, ...
    """

    start: int
    stop: int
    pairs: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> int:
        return sum(hi - lo for lo, hi in self.pairs)


def vocabulary_tile(vocabulary: int) -> int:
    """Columns of the target's logits made at a time: the whole of a small vocabulary, else near-equal tiles."""
    tiles = -(-vocabulary // LARGEST_TILE)
    return -(-vocabulary // tiles)


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """What decides how much a target row takes. `itemsize` is the target's, which the compute dtype's mostly is too."""

    steps: int
    hidden: int
    draft_vocabulary: int
    target_vocabulary: int
    itemsize: int = 4
    with_logs: bool = False


def chunk_rows(shape: LossShape, budget: int) -> int:
    """Target rows per chunk such that what grows with them fits `budget` bytes, and never fewer than FEWEST_ROWS.

    A row takes the logits of its pairs in fp32 (again in the compute dtype if that is another); of each pair the
    output, its norm and their gradients; the teacher's logits, probabilities (with and without the mass outside)
    and, for some terms, log-probabilities; and one tile of the target's logits. Beside all that are copies of the
    draft's head in fp32 where a device cannot sum bf16 products in it, and one slice's scratch.
    """
    wide = max(4, shape.itemsize)
    logits = shape.draft_vocabulary * (wide + (shape.itemsize if shape.itemsize < wide else 0))
    states = shape.hidden * (4 * shape.itemsize + 2 * wide)
    teacher = wide * (shape.draft_vocabulary * (3 + shape.with_logs) + vocabulary_tile(shape.target_vocabulary))
    return max(FEWEST_ROWS, budget // (shape.steps * (logits + states) + teacher))


def plan_chunks(row_M: Tensor, sizes: Sequence[int], rows: int, most_rows: int) -> tuple[Chunk, ...]:
    """`row_M` on the CPU: each pair's target row in 0..rows-1, ascending within each step's `sizes[k]` pairs.

    Chunks are as equal as they can be: a last one of a few rows would multiply them at a fraction of the speed.
    """
    count = -(-rows // most_rows)
    edges = [rows * place // count for place in range(count + 1)] if count else [0]
    cuts: list[list[tuple[int, int]]] = []
    first = 0
    for row_m in torch.split(row_M, list(sizes)):
        inside = (torch.searchsorted(row_m, torch.tensor(edges)) + first).tolist()
        cuts.append(list(pairwise(inside)))
        first += row_m.numel()
    chunks = []
    for place, (start, stop) in enumerate(pairwise(edges)):
        pairs = tuple(step[place] for step in cuts)
        stacked_C = torch.cat([row_M[lo:hi] for lo, hi in pairs]) - start
        chunks.append(Chunk(start=start, stop=stop, pairs=pairs, runs=_runs(stacked_C)))
    return tuple(chunks)


def _runs(row_C: Tensor) -> tuple[tuple[int, int, int], ...]:
    if not row_C.numel():
        return ()
    breaks = (row_C.diff() != 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), row_C.numel()]
    firsts = row_C[torch.tensor(edges[:-1])].tolist()
    return tuple((first, last, row) for (first, last), row in zip(pairwise(edges), firsts, strict=True))
