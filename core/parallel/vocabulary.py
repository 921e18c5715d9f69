"""What ranks that share a target's output head send each other; every function is a collective over the group.

Ranks own different numbers of rows, which all of them know on the host: what is sent is padded to the largest, and no
padding comes back.

Shape letters: P ranks, C rows of this rank, A rows of all ranks in rank order, Z columns, X any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from torchspec.core.interfaces.target import VocabularyShards


def gather_counts(counts: Sequence[int], group: ProcessGroup) -> list[list[int]]:
    """Every rank's host integers, in rank order; equally many on all ranks."""
    mine = torch.tensor(list(counts), dtype=torch.int64)
    found: list[list[int]] = _gathered(mine, group).tolist()
    return found


def gather_vectors(x_X: Tensor, shards: VocabularyShards) -> Tensor:
    """[P, X]: every rank's vector."""
    return _gathered(x_X, shards.group)


def gather_rows(x_CZ: Tensor, counts: Sequence[int], shards: VocabularyShards) -> Tensor:
    """[A, Z]: the `counts[r]` rows of every rank r. All ranks send the same dtype, so the values are exact."""
    if shards.size == 1:
        return x_CZ
    gathered_PCZ = _gathered(_padded(x_CZ, max(counts)), shards.group)
    return torch.cat([rows_CZ[:count] for rows_CZ, count in zip(gathered_PCZ, counts, strict=True)])


def to_owners(x_AZ: Tensor, counts: Sequence[int], shards: VocabularyShards) -> Tensor:
    """[P, C, Z]: what every rank made of this rank's rows."""
    if shards.size == 1:
        return x_AZ[None]
    parts = [_padded(rows_CZ, max(counts)) for rows_CZ in torch.split(x_AZ, list(counts))]
    received = shards.communication.all_to_all(parts, shards.group)
    return torch.stack([part[: counts[shards.rank]] for part in received])


def summed(x: Tensor, shards: VocabularyShards) -> Tensor:
    """The sum over the ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.SUM, group=shards.group)
    return x


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered


def _padded(x_CZ: Tensor, rows: int) -> Tensor:
    return F.pad(x_CZ, (0, 0, 0, rows - len(x_CZ))).contiguous()
