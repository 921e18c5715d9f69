"""Which samples make up which optimizer step, and which rank computes which of them.

The order depends on (seed, epoch) alone; the number of ranks only cuts the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def rank_micro_batches(
    batch: Sequence[int], *, rank: int, world_size: int, micro_batch_size: int
) -> list[list[int | None]]:
    """This rank's share of a global batch, in micro-batches of at most `micro_batch_size`, none of them empty.

    Every rank gets the same number of micro-batches. None is a hole: a sample of weight zero that stands where a
    rank has nothing to do while others have. Neighbours in the batch, which are of similar length, go to different
    ranks of the same micro-batch.
    """
    if not 0 <= rank < world_size or micro_batch_size < 1:
        raise ValueError(f"no share for rank {rank} of {world_size} in micro-batches of {micro_batch_size}")
    step = world_size * micro_batch_size
    shares = [list(batch[start : start + step][rank::world_size]) for start in range(0, len(batch), step)]
    return [[*share] if share else [None] for share in shares]


def _shuffled(count: int, seed: int, epoch: int, purpose: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count).

    Sorting raw bits of PCG64 keeps it the same in every version: numpy promises the bits, not what `permutation`
    makes of them.
    """
    source = np.random.PCG64(np.random.SeedSequence((seed % 2**64, epoch, purpose)))
    return np.argsort(np.asarray(source.random_raw(count), dtype=np.uint64), kind="stable")
