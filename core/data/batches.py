"""Which samples make up which optimizer step, and which rank computes which of them.

The order depends on (seed, epoch) alone; the number of ranks only cuts the same global batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def global_batches(
    lengths: Sequence[int], *, batch_size: int, bucket_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, as sample indices; every sample exactly once, the short last batch included.

    Samples are shuffled, sorted by length within windows of `bucket_size` batches, so that a batch holds similar
    lengths, and cut; then the batches are shuffled. Within a batch lengths ascend.
    """
    if batch_size < 1 or bucket_size < 1:
        raise ValueError(f"batch_size and bucket_size must be at least 1, got {batch_size} and {bucket_size}")
    sizes = np.asarray(lengths, dtype=np.int64)
    order = _shuffled(sizes.size, seed, epoch, 0)
    window = batch_size * bucket_size
    batches: list[list[int]] = []
    for start in range(0, sizes.size, window):
        samples = order[start : start + window]
        samples = samples[np.argsort(sizes[samples], kind="stable")]
        batches += [samples[at : at + batch_size].tolist() for at in range(0, samples.size, batch_size)]
    return [batches[place] for place in _shuffled(len(batches), seed, epoch, 1)]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one forward pass; `packs[row]` are the places among them of the documents that the row holds.

    No samples: a hole, where a rank has nothing to do while others have.
    """

    samples: tuple[int, ...]
    packs: tuple[tuple[int, ...], ...]

    @classmethod
    def rows(cls, samples: Sequence[int]) -> MicroBatch:
        """A row for each."""
        return cls(samples=tuple(samples), packs=tuple((place,) for place in range(len(samples))))

    @classmethod
    def packed(cls, samples: Sequence[int]) -> MicroBatch:
        """All in one row."""
        return cls(samples=tuple(samples), packs=(tuple(range(len(samples))),) if samples else ())


def rank_micro_batches(batch: Sequence[int], *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
    """This rank's share of a global batch, in micro-batches of at most `micro_batch_size`.

    Every rank gets the same number of micro-batches, some of them holes. Neighbours in the batch, which are of similar
    length, go to different ranks of the same micro-batch.
    """
    if not 0 <= rank < world_size or micro_batch_size < 1:
        raise ValueError(f"no share for rank {rank} of {world_size} in micro-batches of {micro_batch_size}")
    step = world_size * micro_batch_size
    turns = (batch[start : start + step] for start in range(0, len(batch), step))
    return [MicroBatch.rows(turn[rank::world_size]) for turn in turns]


def packed_micro_batches(
    batch: Sequence[int],
    lengths: Sequence[int],
    *,
    rank: int,
    world_size: int,
    row_tokens: int,
    equal_length: float = math.inf,
) -> list[MicroBatch]:
    """This rank's share of a global batch, each micro-batch one row of documents of at most `row_tokens` tokens.

    As few rows as fit, the same number on every rank, some of them holes; rows cost about the same, and those of one
    turn, computed by different ranks at the same time, are neighbours in cost. A document of `equal_length` tokens
    costs as much in its attention as in everything else: cost = length + length^2 / equal_length. The longest
    documents are laid first, each into the cheapest row that has room (LPT, Graham 1969).
    Raises ValueError for a document that is longer than a row.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"no share for rank {rank} of {world_size}")
    longest = max(lengths[sample] for sample in batch)
    if longest > row_tokens:
        raise ValueError(f"a document of {longest} tokens does not fit a row of {row_tokens}")
    count = -(-sum(lengths[sample] for sample in batch) // (row_tokens * world_size)) * world_size
    rows = None
    while rows is None:
        rows = _laid_out(batch, lengths, count, row_tokens, equal_length)
        count += world_size
    return [MicroBatch.packed(row) for row in rows[rank::world_size]]


def _laid_out(
    batch: Sequence[int], lengths: Sequence[int], count: int, row_tokens: int, equal_length: float
) -> list[list[int]] | None:
    """The samples in `count` rows, the dearest row first; None if they do not fit."""
    rows: list[list[int]] = [[] for _ in range(count)]
    room, costs = [row_tokens] * count, [0.0] * count
    for sample in sorted(batch, key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        fitting = [row for row in range(count) if room[row] >= length]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda row: costs[row])
        rows[chosen].append(sample)
        room[chosen] -= length
        costs[chosen] += length + length * length / equal_length
    return [rows[row] for row in sorted(range(count), key=lambda row: -costs[row])]


def _shuffled(count: int, seed: int, epoch: int, purpose: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count).

    Sorting raw bits of PCG64 keeps it the same in every version: numpy promises the bits, not what `permutation`
    makes of them.
    """
    source = np.random.PCG64(np.random.SeedSequence((seed % 2**64, epoch, purpose)))
    return np.argsort(np.asarray(source.random_raw(count), dtype=np.uint64), kind="stable")
