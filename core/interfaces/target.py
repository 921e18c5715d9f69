"""What the trainer reads of the target's own weights, and the draft's share of its vocabulary.

Shape letters: T rows, H target hidden size, V target vocabulary, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torchspec.core.interfaces.device import Communication
from torchspec.core.interfaces.features import NormState


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyMap:
    """Which target ids the draft can say: `ids_N` int64, sorted ascending, unique. N = V means no pruning."""

    ids_N: Tensor
    target_size: int

    @property
    def size(self) -> int:
        return self.ids_N.numel()

    @property
    def d2t_N(self) -> Tensor:
        """Offsets as checkpoints store them: target id = i + d2t[i]."""
        return self.ids_N - torch.arange(self.size, device=self.ids_N.device)

    @property
    def t2d_V(self) -> Tensor:
        """bool: the target id is in the draft vocabulary."""
        keep = torch.zeros(self.target_size, dtype=torch.bool, device=self.ids_N.device)
        keep[self.ids_N] = True
        return keep

    @cached_property
    def _host_N(self) -> Tensor:
        return self.ids_N.cpu()

    def cuts(self, edges: Sequence[int]) -> list[int]:
        """How many of the ids lie below each edge. The ids are copied to the host once for all calls."""
        found: list[int] = torch.searchsorted(self._host_N, torch.tensor(edges)).tolist()
        return found

    @classmethod
    def from_offsets(cls, d2t_N: Tensor, target_size: int) -> VocabularyMap:
        return cls(ids_N=d2t_N.long() + torch.arange(d2t_N.numel(), device=d2t_N.device), target_size=target_size)

    @classmethod
    def identity(cls, target_size: int) -> VocabularyMap:
        return cls(ids_N=torch.arange(target_size), target_size=target_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyShards:
    """The rows of a target's output head divided over the ranks of `group`; `core.parallel.vocabulary` communicates.

    `sizes` are the ranks' numbers of rows, in rank order; None divides them as equally as can be. Raises ValueError
    where there are more ranks than rows, or the sizes are not those of the ranks and rows.
    """

    group: ProcessGroup
    communication: Communication
    target_size: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sizes is None and self.target_size < self.size:
            raise ValueError(f"{self.target_size} rows of a head cannot be divided over {self.size} ranks")
        if self.sizes is not None and (
            len(self.sizes) != self.size or min(self.sizes) < 0 or sum(self.sizes) != self.target_size
        ):
            raise ValueError(f"{list(self.sizes)} do not divide {self.target_size} rows over {self.size} ranks")

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def bounds(self, rank: int) -> tuple[int, int]:
        """Rows [start, stop) of the head are group rank `rank`'s."""
        if self.sizes is not None:
            start = sum(self.sizes[:rank])
            return start, start + self.sizes[rank]
        return self.target_size * rank // self.size, self.target_size * (rank + 1) // self.size


class TargetHead(Protocol):
    """The target's embedding, final norm and output head, read from its safetensors; frozen.

    Of a head divided over ranks (`shards`) this process holds the rows `shard_VH`; without shards those are all.
    `head_VH`, and `logits` against the whole head, are for a process that holds all of it.
    """

    @property
    def embedding_VH(self) -> Tensor: ...
    @property
    def head_VH(self) -> Tensor: ...
    @property
    def shard_VH(self) -> Tensor: ...
    @property
    def shards(self) -> VocabularyShards | None: ...

    def rows(self, ids_N: Tensor) -> Tensor:
        """Any rows of the head, [N, H] on its device, whoever holds them and wherever the ids are; no collective."""
        ...

    def normed(self, last_TH: Tensor, state: NormState) -> Tensor:
        """The last hidden states after the final norm, which is applied exactly when `state` is pre_norm."""
        ...

    def logits(self, normed_TH: Tensor, rows_NH: Tensor | None = None) -> Tensor:
        """Target logits of [..., H] states against the whole head, or against given rows of it; fp32 (fp64 for fp64).

        Scaling and soft-capping that the target's architecture applies to its logits are included.
        """
        ...

    def finished(self, products: Tensor) -> Tensor:
        """Logits from fp32 (or fp64) products of states and head rows: the scaling and soft-capping alone."""
        ...
