"""Cutting the loss into chunks of target rows, so that nothing of size [all rows, vocabulary] is ever alive.

A chunk stacks the pairs of all steps that its target rows teach: one product for all of them.

Shape letters: M supervised (slot, step) pairs grouped by step, R target rows, C stacked pairs of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.parallel.vocabulary import gather_counts

ShardLogits = Literal["tokens", "vocabulary"]
"""How logits over a target's head that ranks share are laid out: each rank has its own tokens', over the whole
vocabulary, or all ranks' tokens', over its own part of it."""

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

    @property
    def teaches(self) -> bool:
        """Whether there is anything to do; the same on every rank that works on the chunk."""
        return self.count > 0


@dataclass(frozen=True, kw_only=True)
class SharedChunk(Chunk):
    """A chunk that the ranks of a group work on at once, each with rows and pairs of its own or none.

    place             which of the chunks it is
    rank              this one among the ranks
    rows_P, pairs_P   every rank's numbers of rows and pairs
    """

    place: int
    rank: int
    rows_P: tuple[int, ...]
    pairs_P: tuple[int, ...]

    @property
    def teaches(self) -> bool:
        return sum(self.pairs_P) > 0

    @property
    def own_rows(self) -> slice:
        """This rank's among the rows of all ranks."""
        return _own(self.rows_P, self.rank)

    @property
    def own_pairs(self) -> slice:
        """This rank's among the pairs of all ranks."""
        return _own(self.pairs_P, self.rank)


def _own(counts: Sequence[int], rank: int) -> slice:
    first = sum(counts[:rank])
    return slice(first, first + counts[rank])


def vocabulary_tile(vocabulary: int) -> int:
    """Columns of the target's logits made at a time: the whole of a small vocabulary, else near-equal tiles."""
    tiles = -(-vocabulary // LARGEST_TILE)
    return -(-vocabulary // tiles)


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """What decides how much a target row takes. `itemsize` is the target's, which the compute dtype's mostly is too.

    ranks, shard_logits    how many share the target's head, and how; one has all of it
    """

    steps: int
    hidden: int
    draft_vocabulary: int
    target_vocabulary: int
    itemsize: int = 4
    with_logs: bool = False
    ranks: int = 1
    shard_logits: ShardLogits = "tokens"


def chunk_rows(shape: LossShape, budget: int) -> int:
    """Target rows per chunk such that what grows with them fits `budget` bytes, and never fewer than FEWEST_ROWS.

    A row takes the logits of its pairs in fp32 (again in the compute dtype if that is another); of each pair the
    output, its norm and their gradients; the teacher's logits, probabilities (with and without the mass outside)
    and, for some terms, log-probabilities; and one tile of the target's logits. Beside all that are copies of the
    draft's head in fp32 where a device cannot sum bf16 products in it, and one slice's scratch.

    Where ranks share the head, `budget` is each rank's and the rows are its own. It works on those of all ranks, over
    its part of the vocabulary: as many logits, but states of all ranks, padded and as they are, and tiles of as many
    rows. By tokens the logits are sent beside that (twice, as the device's all-to-all copies them) and received.
    """
    wide = max(4, shape.itemsize)
    logits = shape.draft_vocabulary * (wide + (shape.itemsize if shape.itemsize < wide else 0))
    states = shape.hidden * (4 * shape.itemsize + 2 * wide)
    tile = shape.ranks * vocabulary_tile(-(-shape.target_vocabulary // shape.ranks))
    teacher = wide * (shape.draft_vocabulary * (3 + shape.with_logs) + tile)
    if shape.ranks > 1:
        teacher += 2 * shape.ranks * shape.hidden * shape.itemsize
        if shape.shard_logits == "tokens":
            teacher += 3 * shape.draft_vocabulary * shape.itemsize
        else:
            states += 5 * shape.ranks * shape.hidden * shape.itemsize
    return max(FEWEST_ROWS, budget // (shape.steps * (logits + states) + teacher))


def plan_chunks(row_M: Tensor, sizes: Sequence[int], rows: int, most_rows: int) -> tuple[Chunk, ...]:
    """`row_M` on the CPU: each pair's target row in 0..rows-1, ascending within each step's `sizes[k]` pairs.

    Chunks are as equal as they can be: a last one of a few rows would multiply them at a fraction of the speed.
    """
    return _cut(row_M, sizes, rows, -(-rows // most_rows))


def plan_shared_chunks(
    row_M: Tensor, sizes: Sequence[int], rows: int, most_rows: int, shards: VocabularyShards
) -> tuple[SharedChunk, ...]:
    """As `plan_chunks`, each rank's own, as many on every rank as the one with most rows needs; on the host.

    A collective over those who share the head, whose group must take CPU tensors. A rank without rows or pairs takes
    part with empty chunks.
    """
    count = max(needed for (needed,) in gather_counts([-(-rows // most_rows)], shards))
    own = _cut(row_M, sizes, rows, count)
    shared = gather_counts([number for chunk in own for number in (chunk.stop - chunk.start, chunk.count)], shards)
    return tuple(
        SharedChunk(
            **vars(chunk),
            place=place,
            rank=shards.rank,
            rows_P=tuple(counts[2 * place] for counts in shared),
            pairs_P=tuple(counts[2 * place + 1] for counts in shared),
        )
        for place, chunk in enumerate(own)
    )


def token_spans(tokens: int, most: int) -> list[slice]:
    """[0, tokens) in spans as equal as they can be, of `most` tokens at the most and FEWEST_ROWS at least; where both
    cannot be, the least counts (`most` below twice FEWEST_ROWS), and fewer tokens than that are one span."""
    count = min(-(-tokens // most), max(1, tokens // FEWEST_ROWS))
    return [slice(*edges) for edges in pairwise(_even_edges(tokens, count))] if count else []


def _even_edges(rows: int, count: int) -> list[int]:
    return [rows * place // count for place in range(count + 1)]


def _cut(row_M: Tensor, sizes: Sequence[int], rows: int, count: int) -> tuple[Chunk, ...]:
    edges = _even_edges(rows, count) if count else [0]
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
