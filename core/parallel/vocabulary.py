"""What ranks that share a target's output head send each other; every function is a collective over the group.

Ranks own different numbers of rows, which all of them know on the host: what is sent is padded to the largest, and no
padding comes back.

Shape letters: P ranks, C rows of this rank, A rows of all ranks in rank order, Z columns, X any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.target import VocabularyShards


def gather_counts(counts: Sequence[int], shards: VocabularyShards) -> list[list[int]]:
    """Every rank's host integers, in rank order; equally many on all ranks."""
    return [each.tolist() for each in _gathered(torch.tensor(list(counts), dtype=torch.int64), shards)]


def gather_vectors(x_X: Tensor, shards: VocabularyShards) -> Tensor:
    """[P, X]: every rank's vector."""
    return torch.stack(_gathered(x_X, shards))


def gather_rows(x_CZ: Tensor, counts: Sequence[int], shards: VocabularyShards) -> Tensor:
    """[A, Z]: the `counts[r]` rows of every rank r. All ranks send the same dtype, so the values are exact."""
    if shards.size == 1:
        return x_CZ
    gathered = _gathered(_padded(x_CZ, max(counts)), shards)
    return torch.cat([rows_CZ[:count] for rows_CZ, count in zip(gathered, counts, strict=True)])


def to_owners(x_AZ: Tensor, counts: Sequence[int], shards: VocabularyShards) -> Tensor:
    """[P, C, Z]: what every rank made of this rank's rows."""
    if shards.size == 1:
        return x_AZ[None]
    parts = [_padded(rows_CZ, max(counts)) for rows_CZ in torch.split(x_AZ, list(counts))]
    received = shards.communication.all_to_all(parts, shards.group)
    return torch.stack([part[: counts[shards.rank]] for part in received])


def summed(x: Tensor, shards: VocabularyShards) -> Tensor:
    """The sum over the ranks."""
    return shards.communication.all_reduce(x, shards.group)


def _gathered(x: Tensor, shards: VocabularyShards) -> list[Tensor]:
    return shards.communication.all_gather(x, shards.group)


def _padded(x_CZ: Tensor, rows: int) -> Tensor:
    return F.pad(x_CZ, (0, 0, 0, rows - len(x_CZ))).contiguous()
